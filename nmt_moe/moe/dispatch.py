"""Which row goes to which expert."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Which row goes to which expert; made once, read by dispatch, experts and combine.

    Attributes:
        row_token: (R,) int64. The token each row comes from; rows are sorted by expert, within an
            expert by token.
        token_rows: (N, K) int64. The rows of each token, in the order of its experts; R where the
            token has fewer than K experts.
        expert_offsets: (E + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]).
        expert_ids: (N, K) int64. What the plan was made of; E in an empty slot.
    """

    row_token: Tensor
    token_rows: Tensor
    expert_offsets: Tensor
    expert_ids: Tensor

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int64."""
        return self.expert_offsets.diff()


def plan_dispatch(
    expert_ids: Tensor, num_experts: int, num_rows: int | None = None
) -> DispatchPlan:
    """Sort the (token, expert) pairs by expert. Dropless: every pair becomes a row.

    Args:
        expert_ids: (N, K) int64; E in an empty slot.
        num_experts: E.
        num_rows: R, the slots that are not empty; N K by default.

    Returns:
        The plan.
    """
    num_tokens, top_k = expert_ids.shape
    sorted_ids, order = expert_ids.reshape(-1).sort(stable=True)
    num_rows = len(order) if num_rows is None else num_rows
    # Empty slots have the largest id, so they stand at the end.
    rows = torch.arange(len(order), device=order.device).clamp_(max=num_rows)
    bounds = torch.arange(num_experts + 1, device=order.device)
    return DispatchPlan(
        row_token=order[:num_rows].div(top_k, rounding_mode="floor"),
        token_rows=torch.empty_like(order).scatter_(0, order, rows).view(num_tokens, top_k),
        expert_offsets=torch.searchsorted(sorted_ids, bounds),
        expert_ids=expert_ids,
    )
