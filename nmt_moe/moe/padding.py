"""Separate the tokens of a batch from its padding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.kernels import is_on_host


@dataclass(frozen=True)
class Unpadded:
    """The M rows, out of the N rows of a batch, that an MoE layer processes.

    If the host can count the tokens without waiting, padding is dropped, and M is the number of
    tokens. Otherwise M = N; tokens come first, and padding follows them as rows of zeros.

    Attributes:
        index: (M,) int64, the position of each of these rows in the batch; None if they are all
            rows, in order.
        row_offsets: (3,) int64, [0, number of tokens, N], if padding follows the tokens; otherwise
            None.
    """

    index: Tensor | None = None
    row_offsets: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """Select these rows, (M, ...), from a batch, (N, ...)."""
        if self.index is None:
            return x
        rows = x.index_select(0, self.index)
        if self.row_offsets is None:
            return rows
        is_padding = torch.arange(len(x), device=x.device) >= self.row_offsets[1]
        return rows.masked_fill(is_padding.unsqueeze(1), 0.0)

    def put_back(self, rows: Tensor, num_rows: int, padding: float = 0) -> Tensor:
        """Put these rows, (M, ...), back into a batch, (N, ...), with `padding` elsewhere."""
        if self.index is None:
            return rows
        # Indices are distinct, so index_copy is deterministic.
        batch = rows.new_full((num_rows, *rows.shape[1:]), padding)
        return batch.index_copy(0, self.index, rows)


def drop_padding(padding_mask: Tensor | None, may_wait: bool) -> Unpadded:
    """Find the tokens of a batch.

    Args:
        padding_mask: (N,) bool, True for padding; None if there is no padding.
        may_wait: Whether the host may wait for the device that `padding_mask` is on.
    """
    if padding_mask is None:
        return Unpadded()
    if may_wait or is_on_host(padding_mask):
        return Unpadded((~padding_mask).nonzero().squeeze(1))
    num_tokens = (~padding_mask).sum()
    bounds = (
        torch.zeros_like(num_tokens),
        num_tokens,
        torch.full_like(num_tokens, len(padding_mask)),
    )
    return Unpadded(padding_mask.argsort(stable=True), torch.stack(bounds))
