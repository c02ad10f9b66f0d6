"""Lose no sentence of a data set, and name one whose two sides do not match."""

from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq.data import data_utils
from fairseq.tasks import translation

from nmt_moe.compat._replace import replace


def keep_every_sentence() -> None:
    """Give the last sentences of a data set a batch of their own.

    Reason: `batch_by_size` drops the last batch if its size is no multiple of
    --required-batch-size-multiple, 8 by default: fairseq-generate leaves out up to 7 sentences, or
    a whole `--batch-size`, and scores the others without a word.
    """
    three = np.arange(3)
    batches = data_utils.batch_by_size(three, lambda _: 1, required_batch_size_multiple=2)
    if sum(map(len, batches)) < len(three):
        replace(data_utils, "batch_by_size", _batching)


def _batching(split: Callable) -> Callable:
    def batch_by_size(indices: Any, *args: Any, **kwargs: Any) -> list[Any]:
        indices = np.asarray(indices)
        if len(indices) == 0:
            return []
        batches = split(indices, *args, **kwargs)
        # Batches are consecutive pieces of the indices, so what is missing is the end.
        rest = indices[sum(map(len, batches)) :]
        # With fixed shapes, sentences are regrouped and none is dropped.
        return [*batches, rest] if len(rest) else batches

    return batch_by_size


def name_uneven_corpora() -> None:
    """Name the data set whose sides have different numbers of sentences.

    Reason: fairseq-preprocess does not compare them, and fairseq-train's assertion names no file.
    """
    replace(translation, "load_langpair_dataset", _loading)


def _loading(load: Callable) -> Callable:
    def load_langpair_dataset(data_path: str, split: str, src: str, *args: Any, **kw: Any) -> Any:
        try:
            return load(data_path, split, src, *args, **kw)
        except AssertionError as error:
            if "same number of examples" not in str(error):
                raise
            # Positional as in fairseq: src_dict, then tgt.
            target = kw["tgt"] if "tgt" in kw else args[1]
            raise ValueError(
                f"the two sides of `{data_path}/{split}.{src}-{target}.*` must have the same "
                "number of sentences, but do not. Give fairseq-preprocess files of the same length."
            ) from error

    return load_langpair_dataset
