"""Divide a language model's text into samples in which begin marks are not targets."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from fairseq.data import token_block_dataset
from fairseq.tasks import language_modeling
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.multilingual_language_modeling import MultilingualLanguageModelingTask
from torch import Tensor

from nmt_moe.compat._replace import replace

# fairseq stores the lengths of samples in 16 bits if --tokens-per-sample fits into 16 bits.
MOST_TOKENS = 65_535


def let_each_sentence_be_a_sample() -> None:
    """Make --sample-break-mode eos work.

    Reason: it needs `numpy.compat.long`, which numpy 2 no longer has.
    """
    if not hasattr(np, "compat") and token_block_dataset.np is np:
        token_block_dataset.np = _NumpyWithLong()


class _NumpyWithLong:
    """numpy with the name from numpy 1 that fairseq still uses."""

    compat = SimpleNamespace(long=np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def name_endless_lines() -> None:
    """Report a line of a text that is too long to be one sample.

    Reason: lengths of 65,536 or more silently wrap around, so that 65,536 becomes 0.
    """
    replace(language_modeling, "TokenBlockDataset", _cutting)


def _cutting(cut: Callable) -> Callable:
    def token_blocks(dataset: Any, sizes: Any, block_size: int | None, **kwargs: Any) -> Any:
        cuts_sentences = str(kwargs.get("break_mode") or "none") == "none"
        if not cuts_sentences and block_size is not None and block_size < MOST_TOKENS:
            check_line_lengths(kwargs.get("split_path", "the input"), sizes)
        return cut(dataset, sizes, block_size, **kwargs)

    return token_blocks


def check_line_lengths(path: str, sizes: Sequence[int]) -> None:
    """Reject a text if the length of a sentence does not fit into 16 bits.

    Args:
        path: Path of the text, for error messages.
        sizes: Number of tokens of each line; there must be at least one line.

    Raises:
        ValueError: if a line is too long. The message names the text, the line and its length.
    """
    longest = int(np.argmax(sizes))
    if sizes[longest] > MOST_TOKENS:
        raise ValueError(
            f"`{path}`, line {longest + 1}: a sentence must have at most {MOST_TOKENS} tokens, "
            f"but this one has {sizes[longest]}. Break the line, or use --sample-break-mode none, "
            "which cuts the text into samples of --tokens-per-sample tokens each."
        )


def count_no_begin_mark_as_target() -> None:
    """Do not count the begin mark of --add-bos-token as a target, as in fairseq-eval-lm.

    Reason: this target is always the same, so the perplexity during training would be far too low.
    """
    for task in (LanguageModelingTask, MultilingualLanguageModelingTask):
        for step in ("train_step", "valid_step"):
            replace(task, step, _leaving_out_begin)


def _leaving_out_begin(step: Callable) -> Callable:
    def task_step(task: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(task.args, "add_bos_token", False) and isinstance(sample.get("target"), Tensor):
            dictionary = task.target_dictionary
            is_begin = sample["target"] == dictionary.bos()
            # A copy, because fairseq may pass the same sample again.
            sample = {
                **sample,
                "target": sample["target"].masked_fill(is_begin, dictionary.pad()),
                "ntokens": sample["ntokens"] - int(is_begin.sum()),
            }
        return step(task, sample, *args, **kwargs)

    return task_step
