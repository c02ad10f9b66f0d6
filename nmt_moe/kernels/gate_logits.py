"""Compute a gate's clean logits and the logits of its noise's scale."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.checks import check_shape
from nmt_moe.kernels._backend import is_on_host
from nmt_moe.kernels._products import LoopProducts
from nmt_moe.kernels.grouped_gemm import grouped_gemm


def gate_logits(
    rows: Tensor,
    gate_weight: Tensor,
    noise_weight: Tensor | None,
    row_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply rows by their gate's two matrices, one for logits and one for the scale of noise.

    The backward pass adds the gradients that `rows` gets from the two products in place, instead of
    creating an (N, D) tensor for each, and keeps their dtype even under autocast. A group without
    rows costs only the time to fill its gradient with zeros.

    Args:
        rows: (N, D), the tokens' vectors.
        gate_weight: (D, E), the gate's weights; with `row_offsets`, (G, D, E), one matrix for each
            group.
        noise_weight: Weights of the noise's scale, in the shape of `gate_weight`; None for no
            noise.
        row_offsets: (G + 1,) int64; group g owns rows [offsets[g], offsets[g + 1]). If None, all
            rows are multiplied by the same matrices.

    Returns:
        clean: (N, E), rows @ gate_weight.
        raw_scale: (N, E), rows @ noise_weight, or None.

    Raises:
        ValueError: if shapes do not match.
    """
    if row_offsets is not None and not is_on_host(rows):  # must not wait for the offsets
        clean = grouped_gemm(rows, gate_weight, row_offsets)
        if noise_weight is None:
            return clean, None
        return clean, grouped_gemm(rows, noise_weight, row_offsets)
    if row_offsets is None:
        check_shape("gate_weight", gate_weight, (rows.shape[1], None), "(D, E)")
        bounds = [0, len(rows)]
        gate_weight = gate_weight.unsqueeze(0)
        noise_weight = None if noise_weight is None else noise_weight.unsqueeze(0)
    else:
        check_shape("row_offsets", row_offsets, (len(gate_weight) + 1,), "(G + 1,)")
        shape = len(row_offsets) - 1, rows.shape[1], None
        check_shape("gate_weight", gate_weight, shape, "(G, D, E)")
        bounds = row_offsets.tolist()
    if noise_weight is not None:
        check_shape("noise_weight", noise_weight, gate_weight.shape, "(G, D, E)")
    return _GateLogits.apply(rows, gate_weight, noise_weight, bounds)


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gate_weight: Tensor,
        noise_weight: Tensor | None,
        bounds: list[int],
    ) -> tuple[Tensor, Tensor | None]:
        ctx.products = products = LoopProducts(bounds)
        ctx.save_for_backward(rows, gate_weight, noise_weight)
        ctx.set_materialize_grads(False)
        clean = products.multiply(rows, gate_weight)
        return clean, None if noise_weight is None else products.multiply(rows, noise_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        products: LoopProducts = ctx.products
        needed = [
            (grad.contiguous(), weight)
            for grad, weight in zip(grads, weights, strict=True)
            if grad is not None
        ]
        grad_rows = None
        if ctx.needs_input_grad[0] and needed:
            grad_rows = torch.empty_like(rows)
            for group, run in products.runs:
                for index, (grad, weight) in enumerate(needed):
                    grad_rows[run].addmm_(grad[run], weight[group].t(), beta=min(index, 1))
        grad_weights = [
            None if grad is None else products.weight_gradient(rows, grad.contiguous())
            for grad in grads
        ]
        return grad_rows, *grad_weights, None
