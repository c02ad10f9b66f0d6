"""Plan the order of rows. Rows are sorted by bin, and each row belongs to one token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.kernels._backend import is_on_host


@dataclass(frozen=True)
class RowPlan:
    """The order of rows, one for each (token, bin) pair, sorted by bin.

    A bin is an expert, a group of experts, or a rank.

    Attributes:
        row_token: (R,) int64, the token of each row; rows are sorted by bin, then by token.
        token_rows: (N, K) int64, the rows of each token, in the order of its slots; R in an empty
            slot. This is the inverse of `row_token`.
        offsets: (B + 1,) int64. Bin b owns rows [offsets[b], offsets[b + 1]). On a device that the
            host would have to wait for, there may be surplus rows at the end. They do not belong to
            any bin or slot and must not be read.
    """

    row_token: Tensor
    token_rows: Tensor
    offsets: Tensor


def plan_rows(bins: Tensor, num_bins: int, num_rows: int | None = None) -> RowPlan:
    """Sort the (token, bin) pairs by bin. Every pair becomes a row, and none are dropped.

    Args:
        bins: (N, K) int64, the bins of each token; B in an empty slot.
        num_bins: Number of bins, B.
        num_rows: Number of slots that are not empty, R. If None, they are counted on the CPU; on
            other devices, R becomes N K, so that the host does not have to wait.

    Returns:
        The plan of R rows.
    """
    num_tokens, num_slots = bins.shape
    keys = bins.reshape(-1)
    if not is_on_host(bins):
        keys = keys.int()  # this halves the number of passes, because GPUs sort digit by digit
    sorted_bins, order = keys.sort(stable=True)
    bounds = torch.arange(num_bins + 1, dtype=keys.dtype, device=order.device)
    offsets = torch.searchsorted(sorted_bins, bounds)
    if num_rows is None:
        num_rows = int(offsets[-1]) if is_on_host(bins) else len(order)
    # Empty slots have the largest bin, so they come last.
    rows = torch.arange(len(order), device=order.device)
    rows = rows.where(sorted_bins < num_bins, num_rows)
    return RowPlan(
        row_token=order[:num_rows].div(num_slots, rounding_mode="floor"),
        token_rows=torch.empty_like(order).scatter_(0, order, rows).view(num_tokens, num_slots),
        offsets=offsets,
    )
