"""Read fairseq's dictionaries as lists of symbols, and look up the indices of pieces."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from nmt_moe.text.lines import read_lines

# The symbols that fairseq puts before the words of every dictionary.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
MARKS = ("<s>", "<pad>", "</s>", "<unk>")
OVERWRITE = " #fairseq:overwrite"


class Vocabulary:
    """The symbols of one side of a model, in the order of its embedding.

    Text never becomes a special symbol: a piece that is spelt like one is unknown.

    Args:
        symbols: All symbols, with fairseq's four special ones first.
        language_marks: Further symbols that never stand for text.
    """

    def __init__(self, symbols: Sequence[str], language_marks: Sequence[str] = ()) -> None:
        self.symbols, self.language_marks = list(symbols), tuple(language_marks)
        self._numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        for mark in (*MARKS, *language_marks):
            self._numbers[mark] = UNK
        self._marks = {mark: self.symbols.index(mark) for mark in language_marks}

    def __len__(self) -> int:
        return len(self.symbols)

    def numbers(self, pieces: Iterable[str]) -> list[int]:
        """Return the index of each piece, or of `<unk>` for pieces not in this vocabulary."""
        return [self._numbers.get(piece, UNK) for piece in pieces]

    def mark(self, name: str) -> int:
        """Return the index of a language token."""
        return self._marks[name]


def read_symbols(path: str | os.PathLike[str]) -> list[str]:
    """Read a dictionary that fairseq wrote, with a word and its count on each line.

    Returns:
        All symbols in fairseq's order: its four special symbols, then the words.

    Raises:
        ValueError: if a line is malformed or a word is repeated; the message names the file and the
            line.
        OSError: if the file cannot be opened.
    """
    symbols = list(MARKS)
    seen = set(symbols)
    for number, line in enumerate(read_lines(path, allow_controls=True), start=1):
        row = line.rstrip()
        is_again = row.endswith(OVERWRITE)
        word, _, count = row.removesuffix(OVERWRITE).rpartition(" ")
        if not word or not count.isdecimal() or (word in seen and not is_again):
            fault = "repeats a word" if word in seen else "is not a word followed by its count"
            raise ValueError(
                f"the dictionary `{path}`, line {number} {fault}: {line[:80]!r}. The file is "
                "damaged or not a dictionary. Copy it again, or write a new one with "
                "fairseq-preprocess."
            )
        symbols.append(word)
        seen.add(word)
    if len(symbols) == len(MARKS):
        raise ValueError(f"the dictionary `{path}` has no words. Copy it again.")
    return symbols


def find_dictionary(folder: Path, language: str | None) -> Path:
    """Return the path of a language's dictionary in binarised data, or of `dict.txt` for None.

    Raises:
        ValueError: if the dictionary does not exist.
    """
    path = folder / ("dict.txt" if language is None else f"dict.{language}.txt")
    if not path.is_file():
        there = ", ".join(sorted(found.name for found in folder.glob("dict*.txt"))) or "none"
        raise ValueError(
            f"`{path}` is missing. Dictionaries in `{folder}`: {there}. Name the folder that "
            "fairseq-preprocess wrote for training this model."
        )
    return path
