"""Split raw text into pieces, and join pieces into text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sentencepiece

from nmt_moe.inference.bundle import TextPipeline
from nmt_moe.text.lines import CONTROLS, MAX_LINE_BYTES, BadLine
from nmt_moe.text.pieces import with_plain_spaces

# Languages written without spaces between sentences.
UNSPACED = {"ja", "zh", "th", "lo", "my", "km"}


def find_fault(text: str) -> str | None:
    """Return the reason why a text cannot be translated, or None if it can be.

    The rules are the same as for lines in files; see `nmt_moe.text.lines`.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"contains half of a surrogate pair, U+{code:04X}, at character {error.start + 1}"
    found = CONTROLS.search(content.replace(b"\r\n", b"\n"))
    if found is not None:
        return f"contains the control character U+{found[0][0]:04X}"
    if len(content) > MAX_LINE_BYTES:
        return f"has more than {MAX_LINE_BYTES} bytes"
    return None


def check_texts(texts: str | Sequence[str], name: str) -> list[str]:
    """Return texts as a list, and reject anything that is not text."""
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"`{name}s` must be a list of strings, but is {type(texts).__name__}.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise ValueError(f"{name} {number} must be a string, but is {type(text).__name__}.")
        fault = find_fault(text)
        if fault is not None:
            raise ValueError(f"{name} {number} {fault}. Remove it, and try again.")
    return texts


def check_line(line: str | BadLine, number: int) -> str | BadLine:
    """Return a line, or a `BadLine` that says why it cannot be translated."""
    fault = find_fault(line) if isinstance(line, str) else None
    return line if fault is None else BadLine(number, fault, "Remove it.")


@dataclass
class SourceText:
    """The conversion of source text into pieces, as in training.

    Attributes:
        pipeline: Steps applied to text before it is split into pieces.
        processor: sentencepiece model that splits text into pieces; None to split at spaces.
        language: Language of the text, if known, for splitting sentences and for punctuation.
    """

    pipeline: TextPipeline
    processor: sentencepiece.SentencePieceProcessor | None
    language: str | None = None

    def split(self, line: str) -> list[list[str]]:
        """Split a line into sentences if it is too long, and return the pieces of each.

        A sentence that is too long is cut between words or, without spaces, between pieces. A line
        without text has no sentences.
        """
        pieces = self.pieces(line)
        most = self.pipeline.max_source_pieces
        if len(pieces) <= most:
            return [pieces] if pieces else []
        parts: list[list[str]] = []
        for sentence in self._sentences(line):
            parts += cut_pieces(self.pieces(sentence), most)
        return parts

    def pieces(self, text: str) -> list[str]:
        """Return the pieces of a text."""
        if self.pipeline.lowercase:
            text = text.lower()
        if self.pipeline.normalize_punctuation:
            text = self._normalizer.normalize(text)
        return cut(text, self.processor)

    def _sentences(self, line: str) -> list[str]:
        import sentencex  # imported late, because only long lines need it

        return [found.strip() for found in sentencex.segment(self.language or "en", line)]

    @cached_property
    def _normalizer(self) -> Any:
        from sacremoses import MosesPunctNormalizer

        return MosesPunctNormalizer(lang=self.language or "en")


@dataclass
class TargetText:
    """The conversion between pieces and target text.

    Attributes:
        processor: sentencepiece model of the pieces; None if they are words between spaces.
        separator: Text between two sentences.
    """

    processor: sentencepiece.SentencePieceProcessor | None
    separator: str = field(default=" ")

    def pieces(self, text: str) -> list[str]:
        """Return the pieces of a text, as on the target side in training."""
        return cut(text, self.processor)

    def join(self, pieces: list[str]) -> str:
        """Return the text of one sentence's pieces."""
        if self.processor is None:
            return " ".join(pieces)
        # `decode_pieces` would replace unknown pieces with its own symbol.
        return "".join(pieces).replace("▁", " ").strip()


def cut(text: str, processor: sentencepiece.SentencePieceProcessor | None) -> list[str]:
    """Return the pieces of a text, or its words if there is no processor."""
    if processor is None:
        return text.split()
    return processor.encode(with_plain_spaces(text), out_type=str)


def separator_of(language: str | None) -> str:
    """Return the separator between two sentences of a language."""
    return "" if language is not None and re.split("[_-]", language)[0] in UNSPACED else " "


def cut_pieces(pieces: list[str], most: int) -> list[list[str]]:
    """Cut a sentence into parts of at most `most` pieces, between words if possible."""
    parts, first = [], 0
    while len(pieces) - first > most:
        ends = range(first + most, first + most // 2, -1)
        end = next((n for n in ends if pieces[n].startswith("▁")), first + most)
        parts.append(pieces[first:end])
        first = end
    return [*parts, pieces[first:]] if pieces else parts
