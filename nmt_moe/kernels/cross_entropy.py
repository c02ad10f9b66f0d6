"""Compute the plain and the smoothed cross-entropy of logits on the CPU, in compiled loops."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.kernels._cpu import load


def cross_entropy(logits: Tensor, target: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Compute -log p of each row's target, and the sum of -log p over all classes.

    The gradient of the logits is the only (N, V) tensor that is created.

    Args:
        logits: (N, V) float32 or float64 on the CPU. `has_compiled_loops` must return True for it.
        target: (N,) int64, the class of each row, from 0 to V - 1, or `ignored`.
        ignored: The target of rows that do not count, such as padding.

    Returns:
        nll: (N,), the negative log-likelihood of each row's target; 0 in ignored rows.
        smooth: (N,), the sum of -log p over all classes, for label smoothing; 0 in ignored rows.

    Raises:
        IndexError: if a target is neither a class nor `ignored`.
    """
    sums: tuple[Tensor, Tensor] = _CrossEntropy.apply(
        logits.contiguous(), target.contiguous(), ignored
    )
    return sums


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
        nll, smooth, log_sums = logits.new_empty(3, len(logits)).unbind(0)
        load().cross_entropy(logits, target, ignored, nll, smooth, log_sums)
        ctx.save_for_backward(logits, target, log_sums)
        ctx.ignored = ignored
        return nll.clone(), smooth.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, grad_smooth: Tensor) -> tuple[Tensor, None, None]:
        logits, target, log_sums = ctx.saved_tensors
        grad_logits = logits.new_empty(logits.shape)
        grads = grad_nll.contiguous(), grad_smooth.contiguous()
        load().cross_entropy_backward(logits, target, ctx.ignored, log_sums, *grads, grad_logits)
        return grad_logits, None, None
