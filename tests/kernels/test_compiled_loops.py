"""The library of compiled loops is found and checked, and torch replaces it if it is missing."""

import shutil
import subprocess
import sys

import pytest
import torch

from nmt_moe.kernels import has_compiled_loops
from nmt_moe.kernels._cpu import build, loading
from nmt_moe.nn import ProjectedLSTM


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    loading.load.cache_clear()
    yield tmp_path
    loading.load.cache_clear()


def test_without_the_library_torch_does_the_work(empty_folder):
    layer, x = ProjectedLSTM(5, 7, 4), torch.randn(3, 2, 5)
    assert not has_compiled_loops(x)
    out, (hidden, cell) = layer(x)
    theirs = layer.lstm(x)
    assert out.equal(theirs[0])
    assert hidden.equal(theirs[1][0][0])
    assert cell.equal(theirs[1][1][0])


def test_a_library_for_another_torch_is_not_loaded(empty_folder, monkeypatch):
    loading.library_path().write_bytes(b"")
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    assert loading.load() is None


def test_a_library_built_from_other_sources_is_not_loaded(
    empty_folder, monkeypatch, tmp_path_factory
):
    loading.library_path().write_bytes(b"")
    sources = tmp_path_factory.mktemp("sources")
    (sources / "loops.cpp").write_text("// of another version")
    monkeypatch.setattr(loading, "SOURCES", sources)
    assert loading.load() is None


def test_without_a_compiler_one_line_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="No C.. compiler was found"):
        build.main()


def test_a_compiler_that_fails_leaves_no_files(empty_folder):
    with pytest.raises(subprocess.CalledProcessError):
        build.build(shutil.which("false"))
    assert list(empty_folder.iterdir()) == []


@pytest.mark.slow
def test_the_library_compiles_and_loads_here(empty_folder):
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    made = build.build(compiler)
    program = f"import torch; torch.ops.load_library({str(made)!r}); torch.ops.nmt_moe.lstm_step"
    subprocess.run([sys.executable, "-c", program], check=True)
