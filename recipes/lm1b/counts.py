#!/usr/bin/env python3
"""Count the sentences and words of train, valid and test, and compare them with published counts.

The benchmark's README gives 829,250,940 training tokens, which include a start mark and an end mark
for each sentence. Without the marks of the 30,301,028 sentences, there are 768,648,884 words;
others have counted the same number. For each held-out shard, the README gives the number of scored
tokens, which are the words and one end mark per sentence.

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
    """Counts of a text with one sentence per line."""

    sentences: int
    words: int

    @property
    def scored(self) -> int:
        """Return the number of scored tokens: words and end marks."""
        return self.words + self.sentences


# The expected counts, by part and kind. For the held-out shards 00000 (test) and 00001 (valid),
# only the number of scored tokens is published.
PUBLISHED: Mapping[tuple[str, str], int] = {
    ("train", "sentences"): 30_301_028,
    ("train", "words"): 768_648_884,
    ("valid", "scored"): 165_560,
    ("test", "scored"): 159_658,
}
NAMES = {
    "sentences": "sentences",
    "words": "words, not counting end marks",
    "scored": "words and end marks",
}


def count(path: Path) -> Counts:
    """Count lines, and words separated by ASCII white space, as in the published figures.

    `wc -w` leaves out words without a printable character; the training text has 2,358 of them.
    """
    sentences = words = 0
    with path.open("rb") as file:
        for line in file:
            sentences += 1
            words += len(line.split())
    return Counts(sentences, words)


def check_published(counts: Mapping[str, Counts], published: Mapping[tuple[str, str], int]) -> None:
    """Compare counts with the published figures.

    Raises:
        ValueError: if any figures differ; the message gives the required and actual values.
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
@click.option("--published", is_flag=True, help="Reject counts other than the benchmark's.")
def main(text: Path, published: bool) -> None:
    """Count sentences and words, and write `counts.tsv` beside the texts."""
    counts = {part: count(text / part) for part in PARTS}
    for part, found in counts.items():
        print(f"{part}: {found.sentences:,} sentences, {found.words:,} words")
    if published:
        check_published(counts, PUBLISHED)
    rows = [f"{part}\t{found.sentences}\t{found.words}\n" for part, found in counts.items()]
    (text / "counts.tsv").write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
