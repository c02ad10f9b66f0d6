"""Multiply rows by a weight in torch's layout, with a backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nmt_moe.kernels._cpu import has_compiled_loops
from nmt_moe.kernels._matmul import matmul


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T, as `torch.nn.functional.linear` does, with compiled loops where possible.

    Args:
        x: (..., I), the rows.
        weight: (O, I), W.

    Returns:
        (..., O).
    """
    if x.numel() == 0 or not has_compiled_loops(x, weight):
        return F.linear(x, weight)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            matmul(grad, weight) if needs_x else None,
            matmul(grad.t(), x) if needs_weight else None,
        )
