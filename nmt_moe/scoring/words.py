"""Measure how well words of different frequencies are translated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

# Upper ends of the frequency bands; the last band has no upper end.
BAND_ENDS = (1, 4, 9, 99, 999)


def f_measure_by_frequency(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: Callable[[str], str]
) -> list[dict[str, float | int | str]]:
    """Compare the words of translations with the words of references, regardless of their order.

    A word of a translation matches an identical word of the sentence's reference. Bands are ranges
    of a word's frequency in all references.

    Args:
        hypotheses: Translations.
        references: A reference for each translation.
        tokenize: Function that puts spaces between the words of a line.

    Returns:
        A row for each band that has words: `frequency`, `words` of the references, `precision`,
        `recall` and `f_measure` in percent. Band 0 contains words that occur in no reference.

    Source: Neubig et al. 2019, compare-mt, section 2.2.
    """
    pairs = [
        tuple(Counter(tokenize(line).split()) for line in lines)
        for lines in zip(hypotheses, references, strict=True)
    ]
    frequency: Counter[str] = Counter()
    for _, reference in pairs:
        frequency.update(reference)
    written, wanted, matched = Counter[int](), Counter[int](), Counter[int]()
    for hypothesis, reference in pairs:
        for word, count in hypothesis.items():
            band = _band(frequency[word])
            written[band] += count
            matched[band] += min(count, reference[word])
        for word, count in reference.items():
            wanted[_band(frequency[word])] += count
    return [
        _row(band, written[band], wanted[band], matched[band])
        for band in range(len(BAND_ENDS) + 2)
        if written[band] or wanted[band]
    ]


def _band(frequency: int) -> int:
    """Return the index of a frequency's band, or 0 for words that occur in no reference."""
    return 0 if frequency == 0 else 1 + sum(frequency > end for end in BAND_ENDS)


def _row(band: int, written: int, wanted: int, matched: int) -> dict[str, float | int | str]:
    ends = (0, *BAND_ENDS)
    if band == 0:
        name = "0"
    elif band > len(BAND_ENDS):
        name = f"{BAND_ENDS[-1] + 1}-"
    else:
        start, end = ends[band - 1] + 1, ends[band]
        name = f"{start}" if start == end else f"{start}-{end}"
    return {
        "frequency": name,
        "words": wanted,
        "precision": 100 * matched / written if written else 0.0,
        "recall": 100 * matched / wanted if wanted else 0.0,
        "f_measure": 200 * matched / (written + wanted),
    }
