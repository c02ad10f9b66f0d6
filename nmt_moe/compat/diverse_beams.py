"""Make diverse beam search work beyond the first batch."""

from collections.abc import Callable
from typing import Any

from fairseq.search import DiverseBeamSearch
from torch import Tensor

from nmt_moe.compat._replace import replace


def count_diverse_sentences_within_their_batch() -> None:
    """Pass diverse beam search the indices of sentences within the batch.

    Reason: fairseq passes indices into the data set. The search raises an IndexError as soon as
    they exceed the number of sentences in a batch.
    """
    replace(DiverseBeamSearch, "step", _indexing)


def _indexing(step: Callable) -> Callable:
    def diverse_step(
        self: DiverseBeamSearch,
        index: int,
        lprobs: Tensor,
        scores: Tensor | None,
        prev_output_tokens: Tensor | None = None,
        original_batch_idxs: Tensor | None = None,
    ) -> Any:
        if original_batch_idxs is not None:
            if index == 0:
                self.sentence_numbers = original_batch_idxs
            is_same = original_batch_idxs.unsqueeze(1) == self.sentence_numbers
            original_batch_idxs = is_same.long().argmax(dim=1)
        return step(self, index, lprobs, scores, prev_output_tokens, original_batch_idxs)

    return diverse_step
