"""The program that times matrix multiplication for training."""

import pytest
import torch

from benchmarks import training_products
from nmt_moe.kernels import has_compiled_loops


@pytest.mark.parametrize("layout", training_products.LAYOUTS)
def test_operands_have_the_named_layout(layout):
    left, right, out = training_products.make_operands((2, 3, 5, 7), layout)
    assert [tuple(one.shape) for one in (left, right, out)] == [(2, 3, 5), (2, 5, 7), (2, 3, 7)]
    assert left.is_contiguous() == (layout != "left transposed")
    assert right.is_contiguous() == (layout != "right transposed")


@pytest.mark.skipif(not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled")
def test_every_size_and_layout_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(training_products, "OPERATIONS", 1)
    training_products.main(["--sizes", "2x3x5x7", "1x4x4x4", "--rounds", "1", "--threads", "1"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 2 * len(training_products.LAYOUTS)
    for line in table[2:]:
        assert all(float(cell) >= 0 for cell in line.strip("| ").split("|")[2:])
