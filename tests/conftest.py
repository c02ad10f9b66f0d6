"""What all tests share: one thread for each process, and no test without what it needs."""

import importlib.util
import logging
import os
from pathlib import Path

# Before torch is imported: tests that start several processes would fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is defined: Triton's interpreter takes CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("fairseq") is None:
    collect_ignore = ["shell"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu or multigpu where there are too few CUDA devices."""
    needs = {"gpu": 1, "multigpu": 2}
    for item in items:
        for marker, count in needs.items():
            if item.get_closest_marker(marker) and torch.cuda.device_count() < count:
                item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA devices"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the folder of the checkout."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _loggers_speak_again():
    """Undo what a program that ran in this process did to have its output for itself."""
    yield
    logging.disable(logging.NOTSET)
