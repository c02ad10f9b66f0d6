#!/usr/bin/env python3
"""Count sentences and words of train, valid and test, and compare with what is published.

    counts.py --text work/full/text --published

Writes `counts.tsv` beside the texts: part, sentences, words.

The benchmark's README names 829,250,940 training tokens, a mark at each end of a sentence included,
and the scored tokens of its held-out shards, of which sentences have one more than words. Without
the marks of 30,301,028 sentences, 768,648,884 words are left, which others counted too.

Source: https://github.com/ciprian-chelba/1-billion-word-language-modeling-benchmark, README and
README.corpus_generation; sentences: https://huggingface.co/datasets/lm1b.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Counts:
    """What a text of one sentence a line has."""

    sentences: int
    words: int

    @property
    def scored(self) -> int:
        """Tokens whose perplexity is taken: words and ends of sentence."""
        return self.words + self.sentences


# What, of which part, must be how many. Of the held-out shards 00000 (test) and 00001 (valid) only
# the sum is published.
PUBLISHED: Mapping[tuple[str, str], int] = {
    ("train", "sentences"): 30_301_028,
    ("train", "words"): 768_648_884,
    ("valid", "scored"): 165_560,
    ("test", "scored"): 159_658,
}
NAMES = {
    "sentences": "sentences",
    "words": "words, ends of sentence not counted",
    "scored": "words and ends of sentence",
}


def count(path: Path) -> Counts:
    """Count lines and what ASCII white space parts, as the published figures were counted.

    `wc -w` leaves out words without a printable character: 2,358 of the training text.
    """
    sentences = words = 0
    with path.open("rb") as file:
        for line in file:
            sentences += 1
            words += len(line.split())
    return Counts(sentences, words)


def check_published(counts: Mapping[str, Counts], published: Mapping[tuple[str, str], int]) -> None:
    """Compare with the published figures.

    Raises:
        ValueError: naming every figure that differs, as it must be and as it is.
    """
    found = {(part, what): getattr(counts[part], what) for part, what in published}
    wrong = [
        f"{part} must have {expected:,} {NAMES[what]}, but has {found[part, what]:,}"
        for (part, what), expected in published.items()
        if found[part, what] != expected
    ]
    if wrong:
        raise ValueError(
            f"this is not the benchmark's text: {'; '.join(wrong)}. Remove WORK and prepare again."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of train, valid and test")
    parser.add_argument(
        "--published", action="store_true", help="refuse other counts than the benchmark's"
    )
    args = parser.parse_args(arguments)
    try:
        counts = {part: count(args.text / part) for part in PARTS}
        for part, found in counts.items():
            print(f"{part}: {found.sentences:,} sentences, {found.words:,} words")
        if args.published:
            check_published(counts, PUBLISHED)
        rows = [f"{part}\t{found.sentences}\t{found.words}\n" for part, found in counts.items()]
        (args.text / "counts.tsv").write_text("".join(rows), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
