"""A GPU session runs its parts in order, stops, resumes, and can use Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "gpu_session.sh"
# This script replaces Python. It records its arguments, and fails in the part named by FAIL.
STUB = """#!/usr/bin/env bash
[[ $1 != -c ]] || exit 1   # no fairseq
echo "$*" >>"$CALLS"
echo "table of $3"
[[ $3 != "${FAIL:-}" ]]
"""


def run_session(
    out: Path, *arguments: str, python: Path = Path(sys.executable), **environment: str
):
    # PATH excludes compute-sanitizer, because it could not run the stub.
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    return subprocess.run(
        ["bash", str(SCRIPT), str(out), *arguments],
        env={**os.environ, "PATH": path, "NMT_MOE_PYTHON": str(python), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


def test_parts_run_in_order_stop_at_the_first_failure_and_resume_there(stub, tmp_path):
    out, calls = tmp_path / "out", tmp_path / "calls"
    asked = {"python": stub, "CALLS": str(calls)}
    done = run_session(out, **asked, FAIL="gating")
    assert done.returncode == 1
    assert "06-gating failed" in done.stderr
    parts = [line.split()[2] for line in calls.read_text().splitlines()]
    assert parts == ["machine", "rows", "gating"]
    assert (out / "06-gating.failed").read_text() == "table of gating\n"
    assert "table of rows" in (out / "summary.md").read_text()
    calls.unlink()
    done = run_session(out, **asked)
    assert done.returncode == 0, done.stderr
    lines = calls.read_text().splitlines()
    parts = [line.split()[2] for line in lines if "gpu_session" in line]
    expected = ["gating", "adam", "layer", "products", "kernels", "sweep-products", "sweep-adam"]
    assert parts == [*expected, "profile"]
    points = [line.split("--only ")[1].split()[0] for line in lines if "moe_layer" in line]
    assert points == [str(number) for number in range(1, 10)]
    summary = (out / "summary.md").read_text()
    assert summary.index("table of machine") < summary.index("table of gating")
    assert summary.count("not run: fairseq is not installed") == 2
    assert summary.count("not run: compute-sanitizer") == 3


def test_each_point_of_the_grid_has_a_part():
    from benchmarks.moe_points import GRIDS

    assert len(GRIDS["gpu"]) == 9


def test_an_unknown_part_is_refused(stub, tmp_path):
    done = run_session(tmp_path, "gatings", python=stub)
    assert done.returncode == 2
    assert "there is no part gatings" in done.stderr


def test_a_missing_gpu_is_reported(tmp_path):
    done = run_session(tmp_path, "products", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "torch sees no GPU." in done.stderr


def test_one_part_runs_on_a_small_scale_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    done = run_session(tmp_path, "--dry-run", "products")
    assert done.returncode == 0, done.stderr
    assert "| product bfloat16 E=4 rows=16 |" in (tmp_path / "summary.md").read_text()


def test_a_wrong_result_ends_a_part():
    torch = pytest.importorskip("torch")
    from benchmarks.gpu_report import Report, WrongResultError

    report = Report()
    one = torch.ones(3)
    report.compare("the same", one, one, 1e-6)
    with pytest.raises(WrongResultError, match="another"):
        report.compare("another", one * 1.001, one, 1e-6)
    with pytest.raises(WrongResultError, match="not a number"):
        report.compare("not a number", one * float("nan"), one, 1e-6)
    assert report.table().count("WRONG") == 2


@pytest.mark.slow
def test_all_parts_run_on_a_small_scale_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    done = run_session(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert "WRONG" not in summary
    for line in ("gating N=40 E=6 K=2, drawn noise: gradient of raw_scale", "chosen block"):
        assert line in summary
