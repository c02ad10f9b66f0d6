"""Weigh the experts' answers by the gates and add them up per token."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.kernels._backend import uses_triton
from nmt_moe.kernels.gather_rows import sum_rows


def combine_rows(rows: Tensor, gates: Tensor, row_token: Tensor, token_rows: Tensor) -> Tensor:
    """Compute y = sum over the token's K experts of gate times answer.

    The sum runs in the order of K, so repeated runs agree bit for bit.

    Args:
        rows: (R, D). Answers of the experts, in expert order.
        gates: (N, K). Weights of the chosen experts, in the dtype of `rows`; 0 in empty slots.
        row_token: (R,) int64. The token each row belongs to.
        token_rows: (N, K) int64. The rows of each token; R in empty slots.

    Returns:
        (N, D).

    Source: Shazeer et al. 2017, eq. 1.
    """
    return _CombineRows.apply(rows, gates, row_token, token_rows)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gates: Tensor, row_token: Tensor, token_rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, gates, row_token, token_rows)
        return sum_rows(rows, token_rows, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, gates, row_token, token_rows = ctx.saved_tensors
        if uses_triton(rows):
            from nmt_moe.kernels._triton.combine_rows import combine_rows_backward

            return *combine_rows_backward(grad_y, rows, gates, token_rows), None, None
        # One place more: empty slots write there.
        row_gate = rows.new_zeros(len(rows) + 1)
        row_gate[token_rows.reshape(-1)] = gates.reshape(-1)
        grad_rows = grad_y.index_select(0, row_token)
        row_dot = rows.new_zeros(len(rows) + 1)
        torch.sum(grad_rows * rows, 1, out=row_dot[:-1])
        grad_gates = row_dot.index_select(0, token_rows.reshape(-1)).view_as(gates)
        return grad_rows.mul_(row_gate[:-1].unsqueeze(1)), grad_gates, None, None
