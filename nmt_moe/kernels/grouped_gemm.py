"""Multiply each row by the matrix of its expert, with the rows sorted by expert."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.checks import check_shape
from nmt_moe.kernels._products import choose_products


def grouped_gemm(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix.

    On the CPU, each expert that has rows needs one product in the forward pass and one for each
    gradient in the backward pass, and nothing is copied. On CUDA, the host does not wait for the
    device: torch's grouped product runs if it is fast, and the Triton kernels run otherwise.
    float32 products use TF32 only if torch allows it for matrix products
    (`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul.fp32_precision`).

    Args:
        rows: (R, D), sorted by expert.
        weight: (L, D, F), in the dtype of `rows`; one matrix per expert.
        expert_offsets: (L + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]); the first
            offset is 0 and the last is R.

    Returns:
        (R, F), the product of each row and its expert's matrix.

    Raises:
        ValueError: if shapes or dtypes do not match.
    """
    check_shape("weight", weight, (None, None, None), "(L, D, F)")
    num_experts, dim, _ = weight.shape
    check_shape("rows", rows, (None, dim), "(R, D)")
    check_shape("expert_offsets", expert_offsets, (num_experts + 1,), "(L + 1,)")
    check_dtypes(rows, expert_offsets, weight=weight)
    return _GroupedGemm.apply(rows, weight, expert_offsets)


def check_dtypes(rows: Tensor, expert_offsets: Tensor, **weights: Tensor) -> None:
    """Reject weights whose dtype differs from that of the rows, and offsets that are not int64.

    Raises:
        ValueError: if a dtype is wrong; the message names the tensor, its dtype and the required
            dtype.
    """
    for name, weight in weights.items():
        if weight.dtype != rows.dtype:
            raise ValueError(
                f"`{name}` must have the dtype of `rows`, {rows.dtype}, but is {weight.dtype}. "
                "Convert one of them, or use autocast."
            )
    if expert_offsets.dtype != torch.int64:
        raise ValueError(
            f"`expert_offsets` must be torch.int64, but is {expert_offsets.dtype}. "
            "Use `expert_offsets.long()`."
        )


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.products = choose_products(rows, weight, expert_offsets)
        return ctx.products.multiply(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grad.contiguous()
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        return (
            ctx.products.multiply_back(grad, weight) if needs_rows else None,
            ctx.products.weight_gradient(rows, grad) if needs_weight else None,
            None,
        )
