"""Compute the products of neighbouring experts in one batch, padded to equal numbers of rows.

A product of a few rows is too small to be split among the cores, and starting it costs as much as
computing it. With 16 rows per expert, single products took twice as long as batches of four.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.kernels.row_plan import RowPlan

# Maximum average number of padding rows per expert in a batch. These rows cost operations, but
# computing an expert with fewer than about twenty rows takes no longer than reading its weights.
SPARE_ROWS = 8
# A batch may have this many experts, even if there are fewer threads.
MIN_EXPERTS = 4
# Maximum number of rows, including padding, in a batch of several experts. More rows would not stay
# in the cache between products.
MOST_ROWS = 512


@dataclass(frozen=True)
class Batch:
    """Experts with rows that form a (C, height, F) tensor.

    Attributes:
        experts: Slice of the C neighbouring experts, all of which have rows.
        rows: Slice of the padded rows that belong to them.
        height: Number of rows of each expert, including padding.
    """

    experts: slice
    rows: slice
    height: int

    def cut(self, rows: Tensor) -> Tensor:
        """Return this batch's part of all padded rows: (P, F) to (C, height, F)."""
        return self.view(rows[self.rows])

    def view(self, rows: Tensor) -> Tensor:
        """View this batch's rows by expert: (C * height, F) to (C, height, F)."""
        return rows.view(self.experts.stop - self.experts.start, self.height, -1)


@dataclass(frozen=True)
class PaddedPlan:
    """A row plan with room for padding.

    Padding repeats the last row of its expert, so that infinities and NaN do not spread to other
    experts. The gates of the padding are 0.

    Attributes:
        batches: Batches that together contain all experts with rows, in order.
        row_token: (P,) int64, the token of each padded row.
        token_rows: (N, K) int64, the padded rows of each token; P in empty slots.
    """

    batches: list[Batch]
    row_token: Tensor
    token_rows: Tensor

    @property
    def most_rows(self) -> int:
        """Return the number of rows in the largest batch."""
        return max((b.rows.stop - b.rows.start for b in self.batches), default=0)


def plan_padding(plan: RowPlan) -> PaddedPlan:
    """Choose which experts share a batch, and add the padding to a plan."""
    counts = plan.offsets.diff()
    batches = plan_batches(counts.tolist(), max(MIN_EXPERTS, torch.get_num_threads()))
    num_rows, num_padded = len(plan.row_token), batches[-1].rows.stop if batches else 0
    if num_padded == num_rows:
        return PaddedPlan(batches, plan.row_token, plan.token_rows)
    heights = torch.zeros_like(counts)
    for batch in batches:
        heights[batch.experts] = batch.height
    starts = heights.cumsum(0).sub_(heights)
    expert = torch.arange(len(counts)).repeat_interleave(heights)
    index = torch.arange(num_padded).sub_(starts[expert])  # index within its expert
    row = plan.offsets[expert] + torch.minimum(index, counts[expert] - 1)
    shift = (starts - plan.offsets[:-1]).repeat_interleave(counts)
    moved = torch.cat([torch.arange(num_rows) + shift, starts.new_tensor([num_padded])])
    return PaddedPlan(batches, plan.row_token[row], moved[plan.token_rows])


def plan_batches(counts: list[int], most_experts: int) -> list[Batch]:
    """Put neighbouring experts into one batch while padding and size stay within the limits.

    Args:
        counts: Number of rows of each expert.
        most_experts: Maximum number of experts in a batch.
    """
    batches: list[Batch] = []
    expert = start = 0
    while expert < len(counts):
        height = total = counts[expert]
        stop = expert + 1
        while height and stop < min(expert + most_experts, len(counts)) and counts[stop]:
            higher, more = max(height, counts[stop]), total + counts[stop]
            size = stop + 1 - expert
            if higher * size > min(more + SPARE_ROWS * size, MOST_ROWS):
                break
            height, total, stop = higher, more, stop + 1
        if height:
            rows = slice(start, start + height * (stop - expert))
            batches.append(Batch(slice(expert, stop), rows, height))
            start = rows.stop
        expert = stop
    return batches
