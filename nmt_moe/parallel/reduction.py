"""Sum over the batches of all ranks."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, as a differentiable operation.

    All ranks of the default process group must run its forward and backward pass the same number of
    times. Without a process group, or with one rank, the tensor is returned unchanged.

    Args:
        values: A tensor of the same shape on all ranks.

    Returns:
        The sum, the same on all ranks. The gradient of `values` is the gradient of the result,
        summed over all ranks.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return values
    if distributed.get_world_size() == 1:
        return values
    return _SumOverRanks.apply(values)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_reduce(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_reduce(grad)


def _all_reduce(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


def ring_bytes(num_bytes: int, world_size: int) -> int:
    """Return the number of bytes that each rank sends in a ring all-reduce of `num_bytes` bytes."""
    return 2 * num_bytes * (world_size - 1) // world_size
