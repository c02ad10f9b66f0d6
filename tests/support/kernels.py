"""Helpers for the tests of fast operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

# The parameter value that a test uses to request the fixture `device`.
ON_DEVICE = pytest.param("triton", marks=pytest.mark.device)


def assert_same(ours: Tensor, theirs: Tensor, leaves: dict[str, Tensor], **tolerance: float):
    """Compare outputs, and the gradients of all `leaves` for a random output gradient."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    grad = torch.randn_like(theirs)
    tensors = list(leaves.values())
    mine = torch.autograd.grad(ours, tensors, grad)
    expected = torch.autograd.grad(theirs, tensors, grad)
    for name, one, other in zip(leaves, mine, expected, strict=True):
        torch.testing.assert_close(
            one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def offsets_of(counts: list[int]) -> Tensor:
    """Return (L + 1,) int64 offsets of experts with the given numbers of rows."""
    return torch.tensor([0, *counts]).cumsum(0)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that elements that are never written are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
