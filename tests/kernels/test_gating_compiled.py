"""The kernels of noisy top-k gating compile to efficient code for A100 and H100."""

from pathlib import Path

import pytest

from tests.support.compile_triton import compile_report

PROGRAM = Path(__file__).parent.parent / "support" / "compile_gating.py"


@pytest.fixture(scope="module")
def reports():
    pytest.importorskip("triton")
    return compile_report(PROGRAM)


def test_all_compile_and_keep_their_numbers_in_registers(reports):
    assert len(reports) == 2 * (4 * 2 + 2 * 3)  # GPUs; whole rows, and rows in chunks
    for name, report in reports.items():
        # CUDA's sine and cosine reserve 32 bytes for angles that do not occur.
        assert report["spilled"] <= 32, name
        assert report["registers"] <= 168, name  # three blocks of 128 threads on a multiprocessor
        assert report["shared"] <= 16 * 1024, name


def test_offsets_have_64_bits(reports):
    """Rows times experts may exceed 2^31."""
    for name, report in reports.items():
        assert report["narrow_offsets"] == 0, name
