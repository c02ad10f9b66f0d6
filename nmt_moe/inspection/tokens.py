"""Find the words around a token, and the token's classes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

SPACE = "▁"
MARK = re.compile(r"<2[^<>]+>|</s>")
# Maximum number of words and characters on each side of the middle word.
AROUND_WORDS, AROUND_CHARACTERS = 6, 48
# Upper ends of the frequency bands of pieces.
FREQUENCY_ENDS = (1, 9, 99, 999)


def begins_word(token: str, has_pieces: bool) -> bool:
    """Return whether a token begins a word, as special symbols and whole words do."""
    return not has_pieces or token.startswith(SPACE) or MARK.fullmatch(token) is not None


def context_of(tokens: Sequence[str], index: int, has_pieces: bool = True) -> list[str]:
    """Return a token in the context of whole words.

    Args:
        tokens: The tokens of a sentence.
        index: Index of the token.
        has_pieces: Whether tokens are sentencepiece pieces instead of words.

    Returns:
        Five texts: the words before, the beginning of the token's word, the token, the rest of its
        word, and the words after.
    """
    starts = [n for n, token in enumerate(tokens) if begins_word(token, has_pieces)]
    first = max((n for n in starts if n <= index), default=0)
    end = min((n for n in starts if n > index), default=len(tokens))
    if MARK.fullmatch(tokens[first]):
        first, end = index, index + 1  # special symbols are never part of a longer word
    left, right = tokens[:first], tokens[end:]
    return [
        _shorten(_text(left, has_pieces).split(" ")[-AROUND_WORDS:], keep_end=True),
        _text(tokens[first:index], has_pieces),
        # A piece may be just a space.
        _text(tokens[index : index + 1], has_pieces) or tokens[index],
        _text(tokens[index + 1 : end], has_pieces),
        _shorten(_text(right, has_pieces).split(" ")[:AROUND_WORDS], keep_end=False),
    ]


def _text(tokens: Sequence[str], has_pieces: bool) -> str:
    if not has_pieces:
        return " ".join(tokens)
    spaced = (f" {token}" if MARK.fullmatch(token) else token for token in tokens)
    return "".join(spaced).replace(SPACE, " ").strip()


def _shorten(words: list[str], keep_end: bool) -> str:
    text = " ".join(words)
    if len(text) <= AROUND_CHARACTERS:
        return text
    if keep_end:
        return "…" + text[-AROUND_CHARACTERS:]
    return text[:AROUND_CHARACTERS] + "…"


def classes_of(tokens: Sequence[str], has_pieces: bool = True) -> list[list[str]]:
    """Return each token's classes, which follow from its form and position.

    No tagger is used: classes describe spelling (digit, punctuation, upper case, capitalised),
    position in the word and position in the sentence.
    """
    is_word = [MARK.fullmatch(token) is None for token in tokens]
    order = [n for n, is_own in enumerate(is_word) if is_own]
    rank = {n: place for place, n in enumerate(order)}
    result = []
    for number, token in enumerate(tokens):
        if not is_word[number]:
            result.append(["end of sentence" if token == "</s>" else "language token"])
            continue
        classes = _spelling(token.removeprefix(SPACE) if has_pieces else token)
        if has_pieces:
            is_first = begins_word(token, has_pieces) or number == 0
            follows = number + 1 < len(tokens) and not begins_word(tokens[number + 1], has_pieces)
            classes.append(
                ("beginning of a word" if follows else "whole word")
                if is_first
                else "inside a word"
            )
        place = rank[number]
        if place == 0:
            classes.append("first in the sentence")
        if place == len(order) - 1:
            classes.append("last in the sentence")
        classes.append(f"quarter {4 * place // len(order) + 1} of the sentence")
        result.append(classes)
    return result


def _spelling(text: str) -> list[str]:
    classes = []
    if any(character.isdigit() for character in text):
        classes.append("digit")
    if text and all(unicodedata.category(character)[0] in "PS" for character in text):
        classes.append("punctuation")
    if len(text) > 1 and text.isupper():
        classes.append("upper case")
    elif text[:1].isupper():
        classes.append("capitalised")
    elif text[:1].islower():
        classes.append("lower case")
    return classes


def frequency_band(count: int) -> str:
    """Return the frequency band of a piece."""
    start = 1
    for end in FREQUENCY_ENDS:
        if count <= end:
            times = f"{start}" if start == end else f"{start} to {end}"
            return f"piece seen {times} times" if end > 1 else "piece seen once"
        start = end + 1
    return f"piece seen {start} times or more"
