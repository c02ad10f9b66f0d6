"""Divide a data set into batches without losing a sentence."""

from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq.data import data_utils
from fairseq.tasks import FairseqTask

from nmt_moe.compat._replace import replace


def keep_every_sentence() -> None:
    """Put the last sentences of a data set into a separate batch.

    Reason: `batch_by_size` drops the last batch if its size is not a multiple of
    --required-batch-size-multiple, 8 by default. fairseq-generate then silently leaves out up to 7
    sentences, or a whole batch of `--batch-size` sentences, and scores only the rest.
    """
    three = np.arange(3)
    batches = data_utils.batch_by_size(three, lambda _: 1, required_batch_size_multiple=2)
    if sum(map(len, batches)) < len(three):
        replace(data_utils, "batch_by_size", _keeping)


def _keeping(split: Callable) -> Callable:
    def batch_by_size(indices: Any, *args: Any, **kw: Any) -> list[Any]:
        indices = np.asarray(indices)
        if len(indices) == 0:
            return []
        batches = split(indices, *args, **kw)
        # Batches are consecutive slices of the indices, so only the end can be missing.
        rest = indices[sum(map(len, batches)) :]
        # With fixed shapes, sentences are regrouped, and none is dropped.
        return [*batches, rest] if len(rest) else batches

    return batch_by_size


def name_sentences_longer_than_a_batch() -> None:
    """Report a sentence that is too long for any batch, and the options that allow it.

    Reason: the assertion that ends the command names neither the sentence nor the options.
    """
    replace(data_utils, "batch_by_size", _naming)


def _naming(split: Callable) -> Callable:
    def batch_by_size(indices: Any, num_tokens_fn: Callable, *args: Any, **kw: Any) -> list[Any]:
        try:
            return split(indices, num_tokens_fn, *args, **kw)
        except AssertionError as error:
            if "max_tokens" not in str(error):
                raise
            longest = max(indices, key=num_tokens_fn)
            raise ValueError(
                f"sample #{longest} must have at most {kw.get('max_tokens')} tokens, the size of a "
                f"batch, but has {num_tokens_fn(longest)}. Allow more with --max-tokens (when "
                f"validating, --max-tokens-valid), or {_cut_into(kw.get('max_tokens'))}."
            ) from error

    return batch_by_size


def _cut_into(tokens: Any) -> str:
    """Return advice to cut text into smaller blocks.

    The default of --tokens-per-sample may be too large.
    """
    return (
        "cut a language model's text into blocks that fit: --sample-break-mode none "
        f"--tokens-per-sample {tokens}"
    )


def name_texts_that_are_skipped_whole() -> None:
    """Report that a data set has only samples that are too long, and name the options to change.

    Reason: fairseq either says only that "the dataset is empty", or reports no error and translates
    nothing.
    """
    replace(FairseqTask, "filter_indices_by_size", _filtering)


def _filtering(keep: Callable) -> Callable:
    def filter_indices_by_size(
        task: Any, indices: Any, dataset: Any, max_positions: Any = None, *args: Any, **kw: Any
    ) -> Any:
        kept = keep(task, indices, dataset, max_positions, *args, **kw)
        # A data set without a name usually comes from fairseq-interactive and has only a few lines.
        split = next((name for name, known in task.datasets.items() if known is dataset), None)
        if split is None or len(kept) or not len(indices):
            return kept
        longest = max(indices, key=lambda index: np.max(dataset.size(index)))
        if isinstance(max_positions, tuple):
            way_out = "--max-tokens, --max-source-positions and --max-target-positions"
        else:
            way_out = f"--max-tokens, or {_cut_into(max_positions)}"
        raise ValueError(
            f"Each sample in `{split}` must have at most {_spell(max_positions)} tokens, but none "
            f"does ({len(indices)} in total). The longest, #{longest} (counted from 0), has "
            f"{_spell(dataset.size(longest))} tokens. Allow more with {way_out}."
        )

    return filter_indices_by_size


def _spell(tokens: Any) -> str:
    """Format a number of tokens, or one for each side."""
    if isinstance(tokens, tuple):
        return f"{tokens[0]} source and {tokens[1]} target"
    return str(tokens)
