"""Copy each token's vector to its rows in expert order; add them up again going back."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nmt_moe.kernels._backend import uses_triton


def gather_rows(x: Tensor, row_token: Tensor, token_rows: Tensor) -> Tensor:
    """Copy tokens to rows, with a backward pass that gathers instead of scattering.

    Each token owns at most K rows, so its gradient is a sum over K known places: no atomics and no
    `index_add`, hence the same bits in every run.

    Args:
        x: (N, D). Vectors of the tokens.
        row_token: (R,) int64. The token each row comes from.
        token_rows: (N, K) int64. The rows of each token; the inverse of `row_token`. R where a
            token has fewer than K.

    Returns:
        (R, D). `x[row_token]`.
    """
    return _GatherRows.apply(x, row_token, token_rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_token: Tensor, token_rows: Tensor) -> Tensor:
        ctx.save_for_backward(token_rows)
        if uses_triton(x):
            from nmt_moe.kernels._triton import gather_rows as kernels

            return kernels.gather_rows(x, row_token)
        return x.index_select(0, row_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (token_rows,) = ctx.saved_tensors
        return sum_rows(grad_rows, token_rows), None, None


def sum_rows(rows: Tensor, token_rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up the rows of each token, in the order of K.

    Args:
        rows: (R, D).
        token_rows: (N, K) int64; R for no row.
        weights: (N, K), 0 where there is no row; None for ones.

    Returns:
        (N, D).
    """
    if uses_triton(rows):
        from nmt_moe.kernels._triton import gather_rows as kernels

        return kernels.sum_rows(rows, token_rows, weights)
    if len(rows) < token_rows.numel():  # slots without a row refer to one of zeros
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return F.embedding_bag(token_rows, rows, mode="sum", per_sample_weights=weights)
