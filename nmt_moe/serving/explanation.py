"""Explain a translation: its words, the source words that they attend to, and the experts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nmt_moe.inference import Sentence, Translation, separator_of
from nmt_moe.serving.models import Model

# Smaller shares of a word's attention are left out.
LEAST_SHARE = 0.05
START = "▁"


@dataclass(frozen=True)
class Word:
    """Pieces that a reader sees as one word, or as punctuation.

    Attributes:
        text: Text of the word, without spaces.
        first: Index of the word's first piece.
        last: Index after the word's last piece.
        space: Whether there is a space before the word.
    """

    text: str
    first: int
    last: int
    space: bool


def find_words(pieces: Sequence[str], has_pieces: bool, is_spaced: bool) -> list[Word]:
    """Group pieces into words; each piece belongs to one word.

    Args:
        pieces: The pieces of a sentence.
        has_pieces: Whether they are sentencepiece pieces instead of whole words.
        is_spaced: Whether the language puts spaces between words; if not, each piece is a word.
    """
    starts = [
        not has_pieces or not is_spaced or piece.startswith(START) or _changes(before, piece)
        for before, piece in zip(["", *pieces], pieces, strict=False)
    ]
    firsts = [index for index, starts_here in enumerate(starts) if starts_here or index == 0]
    lasts = [*firsts[1:], *([len(pieces)] if pieces else [])]
    return [
        Word(
            "".join(pieces[first:last]).replace(START, " ").strip(),
            first,
            last,
            first > 0 and (not has_pieces or pieces[first].startswith(START)),
        )
        for first, last in zip(firsts, lasts, strict=True)
    ]


def _changes(before: str, piece: str) -> bool:
    """Return whether a word ends between two pieces because just one of them is punctuation."""
    return before.strip(START) != "" and _is_punctuation(before) != _is_punctuation(piece)


def _is_punctuation(piece: str) -> bool:
    inner = piece.strip(START)
    return inner != "" and all(unicodedata.category(char)[0] in "PS" for char in inner)


def link_words(
    attention: Tensor, words: Sequence[Word], source_words: Sequence[Word]
) -> list[list[tuple[int, float]]]:
    """Return which source words each word attends to.

    Args:
        attention: (T, S), attention between pieces.
        words: The words of the T pieces.
        source_words: The words of the S pieces.

    Returns:
        For each word, indices of source words with their shares of the attention to all source
        words, averaged over the word's pieces; largest first, without those below `LEAST_SHARE`.
    """
    links = []
    for word in words:
        row = attention[word.first : word.last].mean(dim=0)
        total = max(float(row.sum()), 1e-9)
        shares = [float(row[one.first : one.last].sum()) / total for one in source_words]
        kept = [(index, round(s, 4)) for index, s in enumerate(shares) if s >= LEAST_SHARE]
        links.append(sorted(kept, key=lambda link: -link[1]))
    return links


def explain_line(line: Translation, model: Model, source: str, target: str) -> dict[str, Any]:
    """Return a line's text, score and sentences as plain values."""
    sentences = [_explain(one, model, source, target) for one in line.sentences]
    return {"text": line.text, "score": line.score, "sentences": sentences}


def _explain(sentence: Sentence, model: Model, source: str, target: str) -> dict[str, Any]:
    best = sentence.hypotheses[0]
    words, source_words = [
        find_words(pieces, model.config.has_pieces, separator_of(language.lower()) != "")
        for pieces, language in ((best.pieces, target), (sentence.pieces, source))
    ]
    content = best.to_dict()
    content |= {
        "source_pieces": sentence.pieces,
        "words": [asdict(word) for word in words],
        "source_words": [asdict(word) for word in source_words],
        "links": link_words(best.attention, words, source_words),
    }
    if sentence.experts is not None:
        content["source_experts"] = sentence.experts
    return content
