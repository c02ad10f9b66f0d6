"""Reject texts that are useless for training, and warn about words not in the dictionary."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from fairseq import utils
from fairseq.binarizer import BinarizeSummary, FileBinarizer

from nmt_moe.compat._replace import replace
from nmt_moe.compat.lines import count_lines_once

logger = logging.getLogger(__name__)

# If a text was split into the pieces of the dictionary, far fewer of its tokens are unknown.
MANY_UNKNOWN_PERCENT = 3


def check_texts_before_preprocessing() -> None:
    """Reject texts that are empty, malformed or of unequal length, before any file is written.

    Reason: fairseq binarises them, and training fails later. The check runs when fairseq's `main`
    imports the user's module, because all arguments are known by then.
    """
    replace(utils, "import_user_module", _importing)


def _importing(import_module: Callable) -> Callable:
    def import_user_module(args: Any) -> None:
        import_module(args)
        if hasattr(args, "trainpref") and hasattr(args, "destdir"):
            check_texts(args)

    return import_user_module


def check_texts(args: Any) -> None:
    """Check all texts that fairseq-preprocess will read.

    Raises:
        ValueError: if a text is empty, two sides differ in length, or a line is bad. The message
            names them.
        FileNotFoundError: if a text is missing. The message names it.
    """
    for prefix in _prefixes(args):
        sides = list(_sides(args, prefix))
        counts = {path: count_lines_once(path) for path in sides}
        for path, count in counts.items():
            if count == 0:
                raise ValueError(f"`{path}` is empty: a text must have at least one line.")
        if len(set(counts.values())) > 1 and not args.dict_only:
            listed = " and ".join(f"`{path}` has {count}" for path, count in counts.items())
            raise ValueError(
                f"the two sides of a corpus must have the same number of lines, but {listed}. Find "
                "the line without a counterpart."
            )


def _prefixes(args: Any) -> Iterator[str]:
    if args.trainpref:
        yield args.trainpref
    for prefixes in (args.validpref, args.testpref):
        if prefixes and not args.dict_only:
            yield from prefixes.split(",")


def _sides(args: Any, prefix: str) -> Iterator[str]:
    languages = [args.source_lang] if args.only_source else [args.source_lang, args.target_lang]
    for language in languages:
        yield f"{prefix}.{language}" if language else prefix
    alignment = f"{prefix}.{args.align_suffix}"
    if args.align_suffix and os.path.exists(alignment):
        yield alignment


def warn_of_unknown_words_in_texts() -> None:
    """Warn if many words of a text are not in the dictionary.

    Reason: in a text that was not split into pieces, two thirds of the words are unknown, but
    training still runs.
    """
    replace(FileBinarizer, "multiprocess_dataset", _binarizing)


def _binarizing(binarize: Callable) -> Callable:
    def multiprocess_dataset(input_file: str, *args: Any, **kwargs: Any) -> BinarizeSummary:
        summary = binarize(input_file, *args, **kwargs)
        if summary.num_tok and summary.num_replaced * 100 >= MANY_UNKNOWN_PERCENT * summary.num_tok:
            warn_of_unknown_words(input_file, summary.num_replaced / summary.num_tok)
        return summary

    return multiprocess_dataset


def warn_of_unknown_words(text: str, share: float) -> None:
    """Warn about unknown words in a text, and state their share and their usual cause."""
    logger.warning(
        "%.1f%% of the tokens of `%s` are not in the dictionary. If the dictionary consists of "
        "sentence pieces, split the text into the same pieces first.",
        100 * share,
        text,
    )
