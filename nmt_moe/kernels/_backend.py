"""Which implementation runs an operation: Triton's kernel or plain torch."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

# Triton's interpreter runs kernels on CPU tensors, slowly: for tests and debugging alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; CUDA builds of torch bring it along on Linux."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(tensor: Tensor) -> bool:
    """Return whether an operation on `tensor` runs Triton's kernel: on CUDA, where there is one.

    float64 stays with torch: the kernels add up in float32.
    """
    return tensor.is_cuda and tensor.dtype != torch.float64 and has_triton()
