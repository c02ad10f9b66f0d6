"""Activation functions for inference, computed in place.

torch computes the last elements of a tensor differently from the others, so the last bits of a row
would depend on the number of rows. With compiled loops, they do not.
"""

import torch
from torch import Tensor

from nmt_moe.kernels._cpu import has_compiled_loops, load
from nmt_moe.kernels.quantised import PackedLinear


def sigmoid_residual(y: Tensor, x: Tensor) -> Tensor:
    """Return sigmoid(y) + x for tensors of the same shape; y is overwritten.

    Source: Shazeer et al. 2017, Appendices C.1 and E (an MoE layer's sigmoid and residual).
    """
    if _has_loops(y) and x.shape == y.shape and x.dtype == y.dtype:
        load().sigmoid_residual(y, x)
        return y
    return y.sigmoid_().add_(x)


def tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent of x, which is overwritten."""
    if _has_loops(x):
        load().tanh(x)
        return x
    return x.tanh_()


def log_probabilities(output: PackedLinear, x: Tensor) -> Tensor:
    """Return the log-softmax (R, V) of the softmax layer's logits for rows (R, D)."""
    panels = output.panels()
    if panels is not None and output.bias is None and _has_loops(x):
        return load().log_probabilities(x, panels, output.shape[0])
    return log_softmax(output(x))


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log-probabilities (R, V) of logits (R, V), which may be overwritten."""
    if _has_loops(logits):
        load().log_softmax(logits)
        return logits
    return logits.log_softmax(dim=1)


def _has_loops(x: Tensor) -> bool:
    return x.dtype == torch.float32 and has_compiled_loops(x) and x.is_contiguous()
