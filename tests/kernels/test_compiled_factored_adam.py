"""Factored Adam's kernels compile for A100 and H100."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "support" / "compile_factored_adam.py"


def test_no_kernel_spills_registers():
    pytest.importorskip("triton")
    # Triton does not compile when it interprets.
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert len(reports) == 2 * 2 * 3  # GPUs, dtypes, kernels
    for name, report in reports.items():
        assert report["spilled"] == 0, name
