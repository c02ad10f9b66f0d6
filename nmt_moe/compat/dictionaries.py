"""Report damaged dictionaries, and keep users' text apart from the model's special symbols."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import file_utils
from fairseq.data.dictionary import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE
from fairseq.file_io import PathManager
from fairseq.tokenizer import tokenize_line

from nmt_moe.compat._replace import replace
from nmt_moe.text import pieces
from nmt_moe.text.lines import read_lines

logger = logging.getLogger(__name__)


def name_damaged_dictionaries() -> None:
    """Report the file and line where a dictionary is malformed or incomplete.

    Reason: fairseq prints one of several tracebacks, most of which name neither file nor line.
    """
    replace(Dictionary, "add_from_file", _adding)


def _adding(add: Callable) -> Callable:
    def add_from_file(dictionary: Dictionary, file: Any) -> None:
        if not isinstance(file, str):
            add(dictionary, file)
            return
        size = len(dictionary)
        # Earlier versions accepted words with control characters.
        lines = read_lines(PathManager.get_local_path(file), allow_controls=True)
        for number, line in enumerate(lines, start=1):
            problem = _find_problem(line)
            try:
                if problem is None:
                    add(dictionary, SimpleNamespace(readlines=lambda line=line: [line]))
            except (RuntimeError, ValueError) as error:
                problem = str(error)
            if problem is not None:
                raise ValueError(
                    f"the dictionary `{file}`, line {number}: {problem} The file is damaged or not "
                    "a dictionary. Copy it again, or write a new one with fairseq-preprocess."
                )
        if len(dictionary) == size:
            raise ValueError(f"the dictionary `{file}` has no words. Copy it again.")

    return add_from_file


def _find_problem(line: str) -> str | None:
    """Return why a line does not consist of a word and its count. fairseq checks the rest."""
    word, _, count = line.rstrip().removesuffix(" #fairseq:overwrite").rpartition(" ")
    if not word or not count.isdecimal():
        return f"{_shorten(line)} is not a word followed by its count, such as `the 1061`."
    return None


def _shorten(line: str) -> str:
    return repr(line if len(line) <= 80 else line[:77] + "...")


def name_damaged_sentencepiece_models() -> None:
    """Report the file of `--sentencepiece-model` if it is damaged.

    Reason: sentencepiece's own error does not name the file. Some damage causes no error, but
    changes how text is split.
    """
    replace(SentencepieceBPE, "__init__", _loading)


def cut_text_at_white_space_of_any_kind() -> None:
    """Let `--bpe sentencepiece` split text as `nmt-moe pieces encode` does.

    Reason: fairseq drops white space within pieces, which joins two words into one.
    """
    replace(SentencepieceBPE, "encode", _cutting)


def _cutting(encode: Callable) -> Callable:
    def encode_with_plain_spaces(self: SentencepieceBPE, x: str) -> str:
        return encode(self, pieces.with_plain_spaces(x))

    return encode_with_plain_spaces


def _loading(initialise: Callable) -> Callable:
    def __init__(self: SentencepieceBPE, cfg: Any) -> None:  # noqa: N807
        pieces.load(Path(file_utils.cached_path(cfg.sentencepiece_model)))
        initialise(self, cfg)

    return __init__


def keep_typed_marks_as_text() -> None:
    """Treat `</s>`, `<s>` and `<pad>` in a text as unknown words, with a warning.

    Reason: fairseq reads them as the end mark, the begin mark and padding. A dictionary may list
    further marks in `language_marks`. Tasks that put marks into their own text, such as masked
    language modelling, are not affected, because they encode it without `append_eos`.
    """
    replace(Dictionary, "encode_line", _encoding)


def _encoding(encode: Callable) -> Callable:
    def encode_line(
        dictionary: Dictionary,
        line: str,
        line_tokenizer: Callable = tokenize_line,
        add_if_not_exist: bool = True,
        consumer: Callable | None = None,
        append_eos: bool = True,
        reverse_order: bool = False,
    ) -> torch.IntTensor:
        marks = marks_of(dictionary)

        def tokenize(text: str) -> list[str]:
            words = line_tokenizer(text)
            for mark in marks.intersection(words):
                _warn_of_typed_mark(mark)
                # No word of a dictionary contains a space.
                unknown = dictionary.unk_word if add_if_not_exist else f"{mark} "
                words = [unknown if word == mark else word for word in words]
            return words

        return encode(
            dictionary,
            line,
            tokenize if append_eos else line_tokenizer,
            add_if_not_exist,
            consumer,
            append_eos,
            reverse_order,
        )

    return encode_line


def marks_of(dictionary: Dictionary) -> set[str]:
    """Return the symbols that never stand for text."""
    special = {dictionary.bos_word, dictionary.pad_word, dictionary.eos_word}
    return special | getattr(dictionary, "language_marks", set())


@cache
def _warn_of_typed_mark(mark: str) -> None:
    """Warn about a mark, but only once."""
    logger.warning(
        "the text contains the word `%s`, which is read as an unknown word, not as a special "
        "symbol",
        mark,
    )
