"""The kernels of dispatch, experts and combine compile to efficient code for A100 and H100."""

from pathlib import Path

import pytest

from tests.support.compile_triton import compile_report

PROGRAM = Path(__file__).parent.parent / "support" / "compile_experts.py"


@pytest.fixture(scope="module")
def reports():
    pytest.importorskip("triton")
    return compile_report(PROGRAM)


def test_no_kernel_spills_registers_or_exceeds_shared_memory(reports):
    assert len(reports) == 2 * (3 * 4 + 5 * 3)  # GPUs, dtypes, means
    for name, report in reports.items():
        assert report["spilled"] == 0, name
        assert report["shared"] <= 99 * 1024, name  # the smallest size of a GPU since A100


def test_products_in_half_precision_run_on_tensor_cores(reports):
    for name, report in reports.items():
        if ("multiply" in name or "weight_gradient" in name) and "float32" not in name:
            mean = int(name.split()[-1])
            is_wide = mean > 32 or "weight_gradient" in name  # wgmma takes 64 rows or more
            assert report["wgmma" if "H100" in name and is_wide else "mma"], name
            assert report["wide_copies"], name


def test_float32_stays_float32(reports):
    """Tensor cores would round float32 to TF32."""
    for name, report in reports.items():
        if "float32" in name:
            assert not report["wgmma"], name
            assert not report["mma"], name
