"""All contenders in the benchmark of packed products compute the same product."""

import pytest
import torch

from benchmarks import inference_products

TOLERANCE = {
    **{"FBGEMM half": 1e-2, "oneDNN bfloat16": 5e-2, "oneDNN int8": 5e-2, "_int_mm": 5e-2},
    **{"ours, bfloat16": 5e-2, "ours, int8": 8e-2},
}


@pytest.mark.parametrize("name", inference_products.CONTENDERS)
def test_contenders_agree(name):
    if not inference_products.runs_here(name):
        pytest.skip(f"the processor does not have the instructions for {name}")
    torch.manual_seed(1)
    weight, x = torch.randn(16, 24) * 0.1, torch.randn(3, 24)
    y = inference_products.CONTENDERS[name](weight)(x)
    torch.testing.assert_close(y, x @ weight.t(), rtol=0, atol=TOLERANCE.get(name, 1e-5))


def test_a_table_has_a_row_for_each_matrix_and_number_of_rows(capsys):
    flags = ["--shapes", "16x24", "--batch", "1", "3", "--rounds", "1", "--cache", "0"]
    inference_products.main([*flags, "--threads", "1"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["16x24, 1", "16x24, 3"]
    for row in table[2:4]:
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        names = inference_products.CONTENDERS
        for name, cell in zip(names, cells, strict=True):
            assert float(cell) > 0 if inference_products.runs_here(name) else cell == "-"
