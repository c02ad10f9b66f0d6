#!/usr/bin/env python3
"""Count sentences and words of train, valid and test, and compare with what is published.

The benchmark's README names 829,250,940 training tokens, a mark at each end of a sentence included,
and the scored tokens of its held-out shards, of which sentences have one more than words. Without
the marks of 30,301,028 sentences, 768,648,884 words are left, which others counted too.

Source: https://github.com/ciprian-chelba/1-billion-word-language-modeling-benchmark, README and
README.corpus_generation; sentences: https://huggingface.co/datasets/lm1b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from nmt_moe.cli import command

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


@command("counts.py", "counts.py --text work/full/text --published")
@click.option("--text", type=Path, required=True, help="Folder of train, valid and test.")
@click.option("--published", is_flag=True, help="Refuse other counts than the benchmark's.")
def main(text: Path, published: bool) -> None:
    """Count sentences and words into `counts.tsv` beside the texts."""
    counts = {part: count(text / part) for part in PARTS}
    for part, found in counts.items():
        print(f"{part}: {found.sentences:,} sentences, {found.words:,} words")
    if published:
        check_published(counts, PUBLISHED)
    rows = [f"{part}\t{found.sentences}\t{found.words}\n" for part, found in counts.items()]
    (text / "counts.tsv").write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
