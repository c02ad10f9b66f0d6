"""Set up all tests: use one thread per process, and skip tests whose requirements are not met."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# This must be set before torch is imported. With more threads, the processes that some tests start
# would compete for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter accepts CPU tensors. It must be chosen before any kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("fairseq") is None:
    collect_ignore = ["shell"]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that run on a GPU, and skip tests that need more CUDA devices than are present."""
    needs = {"gpu": 1, "multigpu": 2}
    for item in items:
        uses_device = item.get_closest_marker("device") or "device" in item.fixturenames
        if uses_device and torch.cuda.is_available():
            item.add_marker("gpu")
        for marker, count in needs.items():
            if item.get_closest_marker(marker) and torch.cuda.device_count() < count:
                item.add_marker(pytest.mark.skip(reason=f"needs CUDA devices: {count}"))


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Keep denormal numbers in later tests: building a model for training turns them off."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run Triton kernels and create tensors on CUDA or, with Triton's interpreter, on the CPU."""
    pytest.importorskip("triton")
    from nmt_moe.kernels import _backend

    name = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(_backend, "TRITON_DEVICES", frozenset({name}))
    # Otherwise torch's operations would replace a faulty kernel, and the test would pass.
    monkeypatch.setenv("NMT_MOE_KERNELS", "triton")
    torch.set_default_device(name)
    yield name
    torch.set_default_device(None)


@pytest.fixture
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run torch's operations, which its hooks and modes can see, instead of the compiled loops."""
    from nmt_moe.kernels._cpu import load

    monkeypatch.setenv("NMT_MOE_KERNELS", "torch")
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the folder of the checkout."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _restore_logging():
    """Undo changes that a program made to this process's logging."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    logging.disable(logging.NOTSET)
