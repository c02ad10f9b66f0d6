"""Which row of an array sorted by bin belongs to which token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.kernels._backend import is_on_host


@dataclass(frozen=True)
class RowPlan:
    """Rows sorted by bin: one for each (token, bin) pair.

    A bin is whatever rows are sorted by: an expert, a group of experts, a rank.

    Attributes:
        row_token: (R,) int64. The token of each row; rows are sorted by bin, within a bin by token.
        token_rows: (N, K) int64. The rows of each token, in the order of its slots: the inverse of
            `row_token`. R in a slot that is empty.
        offsets: (B + 1,) int64. Bin b owns rows [offsets[b], offsets[b + 1]). On a device that the
            host would have to wait for, there may be more rows: those belong to no bin and to no
            slot, and nobody may read them.
    """

    row_token: Tensor
    token_rows: Tensor
    offsets: Tensor


def plan_rows(bins: Tensor, num_bins: int, num_rows: int | None = None) -> RowPlan:
    """Sort the (token, bin) pairs by bin. Every pair becomes a row: none is dropped.

    Args:
        bins: (N, K) int64. The bins of each token; B in an empty slot.
        num_bins: B.
        num_rows: R, the slots that are not empty, if known. On the CPU it is counted; elsewhere R
            is N K if it is None, so that the host need not wait.

    Returns:
        The plan.
    """
    num_tokens, num_slots = bins.shape
    sorted_bins, order = bins.reshape(-1).sort(stable=True)
    bounds = torch.arange(num_bins + 1, device=order.device)
    offsets = torch.searchsorted(sorted_bins, bounds)
    if num_rows is None:
        num_rows = int(offsets[-1]) if is_on_host(bins) else len(order)
    # Empty slots have the largest bin, so they are at the end.
    rows = torch.arange(len(order), device=order.device)
    rows = rows.where(sorted_bins < num_bins, num_rows)
    return RowPlan(
        row_token=order[:num_rows].div(num_slots, rounding_mode="floor"),
        token_rows=torch.empty_like(order).scatter_(0, order, rows).view(num_tokens, num_slots),
        offsets=offsets,
    )
