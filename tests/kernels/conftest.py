"""Where the tests of fast operations run."""

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from nmt_moe.kernels._backend import INTERPRETED


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send rows and experts to Triton: interpreted, on CPU tensors, or to the CUDA device."""
    pytest.importorskip("triton")
    for name in ("gather_rows", "combine_rows", "_products"):
        # By import_module: the package's attribute of that name is the function.
        module = import_module(f"nmt_moe.kernels.{name}")
        monkeypatch.setattr(module, "uses_triton", lambda tensor: True)
    if INTERPRETED:
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
