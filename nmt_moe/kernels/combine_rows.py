"""Weight the experts' outputs by their gates and add them up for each token."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.kernels._backend import uses_triton
from nmt_moe.kernels.gather_rows import copy_tokens, sum_rows
from nmt_moe.kernels.row_plan import RowPlan


def combine_rows(rows: Tensor, gates: Tensor | None, plan: RowPlan) -> Tensor:
    """Compute each token's output, the sum over its rows of gate times row.

    Sums run in the order of a token's slots, so repeated runs are bit-identical.

    Args:
        rows: (R, D), the experts' outputs.
        gates: (N, K), in the dtype of `rows` or wider; 0 in empty slots. None for a plain sum.
        plan: Row plan that assigns each row to a token.

    Returns:
        (N, D), the combined outputs.

    Source: Shazeer et al. 2017, eq. 1.
    """
    if gates is None:
        return _SumRows.apply(rows, plan)
    return _CombineRows.apply(rows, gates, plan)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, plan: RowPlan) -> Tensor:
        ctx.save_for_backward(rows, gates, plan.row_token, plan.token_rows)
        return sum_rows(rows, plan.token_rows, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, gates, row_token, token_rows = ctx.saved_tensors
        if uses_triton(rows, "combine_rows"):
            from nmt_moe.kernels._triton.combine_rows import combine_rows_backward

            return *combine_rows_backward(grad_y, rows, gates, token_rows), None
        # Empty slots write to one extra element.
        row_gate = rows.new_zeros(len(rows) + 1)
        row_gate[token_rows.reshape(-1)] = gates.reshape(-1).to(rows.dtype)
        grad_rows = grad_y.index_select(0, row_token)
        row_dot = gates.new_zeros(len(rows) + 1)
        torch.sum(grad_rows * rows, 1, dtype=gates.dtype, out=row_dot[:-1])
        grad_gates = row_dot.index_select(0, token_rows.reshape(-1)).view_as(gates)
        return grad_rows.mul_(row_gate[:-1].unsqueeze(1)), grad_gates, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return sum_rows(rows, plan.token_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return copy_tokens(grad_y, ctx.plan.row_token), None
