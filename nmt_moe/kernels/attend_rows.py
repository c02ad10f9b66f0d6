"""Compute the attention of one decoding step."""

import torch
from torch import Tensor

from nmt_moe.kernels._cpu import has_compiled_loops, load


def attend_rows(
    query: Tensor,
    scale: Tensor,
    keys: Tensor,
    source: Tensor,
    padding: Tensor,
    sentence: Tensor,
    is_product: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the context and the attention weights of each row.

    Args:
        query: (R, D) float32, the projected decoder outputs that attend; it may be overwritten.
        scale: (D,), the vector V of Appendix G.
        keys: (B, S, D), the part of attention that depends only on the source.
        source: (B, S, D), the encoder's outputs.
        padding: (B, S) bool, True for padding.
        sentence: (R,) int64, the sentence of each row, in ascending order.
        is_product: Whether the attention function is the product of eq. 22, with `keys` after tanh,
            or the sum of eq. 21.

    Returns:
        (R, D) contexts, and (R, S) weights, which are 0 at padding.

    Source: Shazeer et al. 2017, Appendix G, eqs. 21 and 22.
    """
    if query.dtype == torch.float32 and has_compiled_loops(query, keys, source):
        tensors = (
            tensor.contiguous() for tensor in (query, scale, keys, source, padding, sentence)
        )
        return load().attend_rows(*tensors, is_product)
    slots = _Slots(sentence, len(keys))
    wide = slots.spread(query)
    if is_product:
        scores = torch.bmm(wide.tanh().mul_(scale), keys.transpose(1, 2))
    else:
        scores = torch.tanh(wide.unsqueeze(2) + keys.unsqueeze(1)) @ scale
    weights = scores.masked_fill_(padding.unsqueeze(1), -torch.inf).softmax(dim=2)
    return slots.collect(torch.bmm(weights, source)), slots.collect(weights)


class _Slots:
    """Slots for rows, equally many for each sentence, so that its keys are read only once.

    Args:
        sentence: (R,) int64, the sentence of each row, ascending.
        num_sentences: Number of sentences, B.
    """

    def __init__(self, sentence: Tensor, num_sentences: int) -> None:
        self.num_sentences, self.width = num_sentences, sentence.numel()
        self.index: Tensor | None = None
        if num_sentences == 1:
            return
        counts = sentence.bincount(minlength=num_sentences)
        self.width = int(counts.max())
        if num_sentences * self.width != sentence.numel():
            first = counts.cumsum(0) - counts
            rank = torch.arange(sentence.numel()) - first[sentence]
            self.index = sentence * self.width + rank

    def spread(self, rows: Tensor) -> Tensor:
        """Return (R, D) rows as (B, W, D), with 0 in empty slots."""
        if self.index is None:
            return rows.view(self.num_sentences, self.width, -1)
        slots = rows.new_zeros(self.num_sentences * self.width, rows.shape[1])
        return slots.index_copy_(0, self.index, rows).view(self.num_sentences, self.width, -1)

    def collect(self, slots: Tensor) -> Tensor:
        """Return (B, W, D) as (R, D) rows."""
        flat = slots.flatten(0, 1)
        return flat if self.index is None else flat[self.index]
