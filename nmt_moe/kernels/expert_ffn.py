"""Run all local experts on rows sorted by expert: relu(rows @ weight_in) @ weight_out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.checks import check_shape
from nmt_moe.kernels._backend import needs_gradient
from nmt_moe.kernels._products import Products, choose_products
from nmt_moe.kernels.grouped_gemm import check_dtypes


def expert_ffn(
    rows: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    expert_offsets: Tensor,
    recompute: bool = False,
) -> Tensor:
    """Run each expert on its rows.

    This function computes grouped products over all experts (see `grouped_gemm`). On CUDA, the ReLU
    and its gradient are fused into them. The backward pass is written by hand, so that each
    expert's weight gradient is one product, written in place. `mixture_ffn` calls this function if
    it has no faster method.

    Args:
        rows: (R, D), sorted by expert.
        weight_in: (L, D, H), the experts' first matrices.
        weight_out: (L, H, D), the experts' second matrices.
        expert_offsets: (L + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]).
        recompute: Whether to recompute the hidden activations in the backward pass instead of
            keeping the (R, H) tensor.

    Returns:
        (R, D), each expert's outputs for its rows.

    Raises:
        ValueError: if shapes or dtypes do not match.

    Source: Shazeer et al. 2017, sections 2 and 3.2, Appendix D (recomputation).
    """
    num_experts, model_dim, hidden_dim = weight_in.shape
    check_shape("rows", rows, (None, model_dim), "(R, D)")
    check_shape("weight_out", weight_out, (num_experts, hidden_dim, model_dim), "(L, H, D)")
    check_shape("expert_offsets", expert_offsets, (num_experts + 1,), "(L + 1,)")
    check_dtypes(rows, expert_offsets, weight_in=weight_in, weight_out=weight_out)
    rows = rows.contiguous()
    products = choose_products(rows, weight_in, expert_offsets)
    keep = needs_gradient(rows, weight_in, weight_out) and not recompute
    return _ExpertFFN.apply(rows, weight_in, weight_out, products, keep)


class _ExpertFFN(torch.autograd.Function):
    """All experts, computed one product after another, without waiting for the device.

    The gates are applied later: `combine_rows` reads every output anyway and multiplies it at no
    extra cost, and the gradient of the gates needs the unweighted outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        products: Products,
        keep: bool,
    ) -> Tensor:
        hidden = products.multiply(rows, weight_in, relu=True)
        ctx.save_for_backward(rows, weight_in, weight_out, hidden if keep else None)
        ctx.products = products
        return products.multiply(hidden, weight_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_in, weight_out, hidden = ctx.saved_tensors
        products, grad_outputs = ctx.products, grad_outputs.contiguous()
        if hidden is None:
            hidden = products.multiply(rows, weight_in, relu=True)
        needs_rows, needs_in, needs_out = ctx.needs_input_grad[:3]
        grad_rows = grad_in = grad_out = None
        if needs_out:
            grad_out = products.weight_gradient(hidden, grad_outputs)
        if needs_rows or needs_in:
            grad_hidden = products.multiply_back(grad_outputs, weight_out, mask=hidden)
            grad_in = products.weight_gradient(rows, grad_hidden) if needs_in else None
            grad_rows = products.multiply_back(grad_hidden, weight_in) if needs_rows else None
        return grad_rows, grad_in, grad_out, None, None
