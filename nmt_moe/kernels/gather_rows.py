"""Copy each token's vector to its rows, and add up the rows' gradients in the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nmt_moe.kernels._backend import is_on_host, uses_triton
from nmt_moe.kernels.row_plan import RowPlan


def gather_rows(x: Tensor, plan: RowPlan) -> Tensor:
    """Copy tokens to rows, with a backward pass that gathers instead of scattering.

    A token has at most K rows, and its gradient is the sum of their gradients. The sum is computed
    without atomics and without `index_add`, so it is bit-identical in every run.

    Args:
        x: (N, D), the tokens' vectors.
        plan: Row plan that assigns each row to a token.

    Returns:
        `x[plan.row_token]`, (R, D).
    """
    return _GatherRows.apply(x, plan)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return copy_tokens(x, plan.row_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grad_rows, ctx.plan.token_rows), None


def copy_tokens(x: Tensor, row_token: Tensor) -> Tensor:
    """Return `x[row_token]`, (R, D)."""
    if uses_triton(x, "gather_rows"):
        from nmt_moe.kernels._triton import gather_rows as kernels

        return kernels.gather_rows(x, row_token)
    return x.index_select(0, row_token)


def sum_rows(rows: Tensor, token_rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up the rows of each token, in the order of its slots.

    Args:
        rows: (R, D), the vectors to add up.
        token_rows: (N, K) int64, the rows of each token; R in an empty slot.
        weights: (N, K), the factor of each row, in the dtype of `rows` or wider; 0 in an empty
            slot. None for ones. Without Triton, they are rounded to the dtype of `rows`.

    Returns:
        (N, D), the sums.
    """
    if uses_triton(rows, "gather_rows"):
        from nmt_moe.kernels._triton import gather_rows as kernels

        return kernels.sum_rows(rows, token_rows, weights)
    weights = None if weights is None else weights.to(rows.dtype)
    # Append a row of zeros for empty slots if there may be any.
    if len(rows) < token_rows.numel() or not is_on_host(rows):
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return F.embedding_bag(token_rows, rows, mode="sum", per_sample_weights=weights)
