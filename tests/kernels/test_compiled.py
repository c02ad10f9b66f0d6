"""Triton kernels compile to efficient code for the A100 and H100 (`benchmarks/gpu_budgets.py`)."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_compile

# With fewer blocks per multiprocessor than these, the latency of loads cannot be hidden.
LEAST_BLOCKS = {"multiply": 2, "weight_gradient": 2, "adam": 3, "gather": 8, "bfloat16 sum": 5}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Compile all kernels in a separate process, because Triton interprets them in this one."""
    file = tmp_path_factory.mktemp("budgets") / "budgets.json"
    command = [sys.executable, "-m", "benchmarks.gpu_budgets", "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("multiply_back 1024", "gating 4096 4 drawn select", "adam update"):
        assert name in done.stdout
    return json.loads(file.read_text())


def chosen(reports: dict, *words: str) -> dict:
    """Return all reports with these words in their names; check that there is at least one."""
    found = {name: found for name, found in reports.items() if all(word in name for word in words)}
    assert found
    return found


def test_all_kernels_are_compiled_for_both_gpus(reports):
    # The terms are the numbers of kernels for rows and zeros, products, products of gates, whole
    # gatings, gatings in chunks, and factored Adam.
    assert len(reports) == 2 * (3 * 4 + 5 * 3 + 2 * 3 + 4 * 2 + 2 * 3 + 2 * 3)


def test_no_kernel_spills_registers_or_exceeds_shared_memory(reports):
    for name, report in reports.items():
        assert report["spilled"] == 0, name
        assert report["shared"] <= 99 * 1024, name  # the smallest limit of GPUs since the A100


def test_enough_blocks_run_at_a_time(reports):
    for kernel, least in LEAST_BLOCKS.items():
        for name, report in chosen(reports, "H100", kernel).items():
            assert report["blocks"] >= least, name
    for name, report in chosen(reports, "H100", "gating").items():
        assert report["warps"] >= 12, name  # blocks of gating have one to four warps


def test_no_product_is_serialised(reports):
    for name, report in reports.items():
        assert not report["warnings"], name


def test_products_in_half_precision_run_on_tensor_cores(reports):
    for kernel in ("multiply", "weight_gradient"):
        for name, report in chosen(reports, "float16", kernel).items():
            mean = int(name.split()[-1])
            is_wide = mean > 32 or kernel == "weight_gradient"  # wgmma takes 64 rows or more
            assert report["wgmma" if "H100" in name and is_wide else "mma"], name
            assert report["wide_copies"], name


def test_float32_stays_float32(reports):
    """Check that no tensor cores are used, because they would round float32 to TF32."""
    for name, report in chosen(reports, "float32").items():
        assert not report["wgmma"], name
        assert not report["mma"], name


def test_products_of_gates_run_on_tensor_cores(reports):
    for name, report in chosen(reports, "tf32x3 gate").items():
        takes_wgmma = "H100" in name and ("256" in name or "weight_gradient" in name)
        assert report["wgmma" if takes_wgmma else "mma"], name


def test_offsets_of_gating_have_64_bits(reports):
    """Check that offsets are wide enough for more than 2^31 numbers, one per row and expert."""
    for name, report in chosen(reports, "gating").items():
        assert report["narrow_offsets"] == 0, name


def test_gating_can_reach_70_percent_of_the_speed_of_a_copy(reports):
    """Check that both passes together take at most 190 instructions per element (156 to 175)."""
    for gpu in ("A100", "H100"):
        for experts in (256, 4096):
            parts = chosen(reports, gpu, f"gating {experts} 4 drawn")
            assert sum(report["per_element"] for report in parts.values()) <= 190, parts


def test_instructions_in_loops_are_counted_as_often_as_they_run():
    listing = "\n".join(
        f"        /*{address:04x}*/                   {code} ;"
        for address, code in (
            *((0x00, "MOV R1, R2"), (0x10, "FADD R1, R2, R3"), (0x20, "FMUL R1, R2, R3")),
            *((0x30, "@P0 BRA 0x20"), (0x40, "FADD R1, R2, R3"), (0x50, "@!P1 BRA 0x10")),
            *((0x60, "EXIT"), (0x70, "BRA 0x70")),
        )
    )
    instructions = gpu_compile.INSTRUCTION.findall(listing)
    assert [name for _, name, _ in instructions[:3]] == ["MOV", "FADD", "FMUL"]
    assert gpu_compile.count_executed(instructions, repeats=0) == 2  # the innermost loop
    assert gpu_compile.count_executed(instructions, repeats=1) == 5  # and the one around it
    assert gpu_compile.count_executed(instructions, repeats=3) == 3
    assert gpu_compile.count_executed(instructions[:3], repeats=4) == 3  # no loop
