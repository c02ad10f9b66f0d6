"""The examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.bundles import make_bundle
from tests.support.pages import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("examples"))[0]


def test_the_notebook_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("BUNDLE", str(bundle))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(EXAMPLES / "layer_and_bundle.ipynb", as_version=4)
    folder = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=folder
    ).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    losses = {
        line.split()[0]: float(line.split()[-1])
        for line in printed.splitlines()
        if line.startswith(("dense,", "8 experts,"))
    }
    assert losses["8"] < losses["dense,"], printed  # a dense network cannot learn all maps
    assert "decoder: CV(importance)" in printed


def test_a_translation_is_drawn(bundle: Path, tmp_path: Path):
    picture = tmp_path / "routing.png"
    command = [sys.executable, EXAMPLES / "routing.py", bundle, "the cat sees a tree"]
    done = subprocess.run(
        [*command, "--output", picture],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_two_processes_share_the_experts():
    python = programs.python()
    done = subprocess.run(
        [
            python,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            EXAMPLES / "expert_parallel.py",
        ],
        env={
            "PYTHON_EXEC": str(python),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "PATH": str(python.parent),
        },
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The processes may write into each other's lines.
    losses = [float(loss) for loss in re.findall(r"update +\d+\D+(\d+\.\d+)", done.stdout)]
    assert losses[-1] < losses[0] / 2
    assert "rank 1 holds experts slice(4, 8, None)" in done.stdout
