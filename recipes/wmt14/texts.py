#!/usr/bin/env python3
"""Clean a parallel text and split it into pieces, pair by pair, in order, on several cores.

    texts.py clean --pair fr --target text/train raw/europarl-v7 raw/commoncrawl
    texts.py cut --pair fr --model spm.model --target pieces/train text/train

Each name stands for NAME.en and NAME.PAIR. Unless --keep-all is given, pairs that are unsuitable
for training are left out and counted by reason.
"""

from __future__ import annotations

import itertools
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import sentencepiece
from sacremoses import MosesPunctNormalizer

from nmt_moe.cli import Group
from nmt_moe.cli._command import Command
from nmt_moe.text.lines import BadLine, open_bytes, scan_lines
from nmt_moe.text.pieces import load
from recipes.downloads import show_progress

# A worker processes this many pairs at a time, which takes about a tenth of a second.
CHUNK = 1000
CONTROL_SPACE = re.compile(r"[\t-\r\x1c-\x1f\x85]")
Pair = tuple[str, str]
# A pair of lines as read from the files.
Lines = tuple[str | BadLine, str | BadLine]
# A worker's result for a pair: its new form, or why it is left out.
Result = Pair | str
Worker = Callable[[Pair], Result]


class Cleaner:
    """A function that removes control characters and extra spaces, and normalises punctuation.

    `normalize` is "source", "both" or "none". "source" normalises only the English side, because
    references keep their typographic quotation marks and the model must produce them.
    """

    def __init__(self, pair: str, normalize: str) -> None:
        normalizers = [
            MosesPunctNormalizer(lang=language, post_remove_control_chars=True)
            for language in ("en", pair)
        ]
        self.sides: list[Callable[[str], str]] = [
            normalizer.normalize
            if normalize == "both" or (normalize == "source" and side == 0)
            else normalizer.remove_control_chars
            for side, normalizer in enumerate(normalizers)
        ]

    def __call__(self, lines: Pair) -> Result:
        # A tab is a control character too, and removing it would join two words.
        joined = [CONTROL_SPACE.sub(" ", line) for line in lines]
        source, target = (
            " ".join(clean(line).split()) for clean, line in zip(self.sides, joined, strict=True)
        )
        return (source, target) if source and target else "empty side"


class Cutter:
    """A function that splits a pair into pieces, or rejects it for its length or length ratio."""

    def __init__(self, model: Path, max_pieces: int, max_ratio: float, keep_all: bool) -> None:
        self.processor: sentencepiece.SentencePieceProcessor = load(model)
        self.max_pieces = max_pieces
        self.max_ratio = max_ratio
        self.keep_all = keep_all

    def __call__(self, lines: Pair) -> Result:
        source, target = (self.processor.encode(line, out_type=str) for line in lines)
        shorter, longer = sorted((len(source), len(target)))
        if not self.keep_all:
            if shorter == 0:
                return "empty side"
            if longer > self.max_pieces:
                return f"over {self.max_pieces} pieces"
            if longer > self.max_ratio * shorter:
                return f"one side more than {self.max_ratio} times as long as the other"
        return " ".join(source), " ".join(target)


_work: Worker


def start_worker(make: Callable[[], Worker]) -> None:
    """Create the cleaner or cutter of a worker process."""
    global _work
    _work = make()


def work_on(chunk: list[Lines]) -> list[Result]:
    return [
        "not UTF-8" if any(isinstance(line, BadLine) for line in lines) else _work(lines)
        for lines in chunk
    ]


def read_pairs(names: Sequence[Path], pair: str) -> Iterator[Lines]:
    """Yield the lines of both sides of all texts; a bad line is a `BadLine`.

    Raises:
        ValueError: if a file is missing, or the sides of a text differ in their number of lines.
    """
    for name in names:
        paths = [Path(f"{name}.{language}") for language in ("en", pair)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
        with open_bytes(paths[0]) as source, open_bytes(paths[1]) as target:
            sides = [
                scan_lines(stream, str(path), allow_controls=True)
                for stream, path in zip((source, target), paths, strict=True)
            ]
            for lines in itertools.zip_longest(*sides):
                if None in lines:
                    raise ValueError(f"{name}: one side has more lines than the other")
                yield lines


def transform(
    pairs: Iterator[Lines],
    make: Callable[[], Worker],
    threads: int,
    title: str,
) -> Iterator[Result]:
    """Yield the result for each pair, in order.

    A round of chunks is read, processed and written before the next is read. Reading further
    ahead, as Pool.imap does, would load the whole text into memory.
    """
    with (
        multiprocessing.Pool(threads, start_worker, (make,)) as pool,
        show_progress(desc=title, unit=" pairs", unit_scale=True) as progress,
    ):
        while chunks := [
            chunk for _ in range(8 * threads) if (chunk := list(itertools.islice(pairs, CHUNK)))
        ]:
            for results in pool.map(work_on, chunks, chunksize=1):
                yield from results
                progress.update(len(results))


def write(results: Iterator[Result], pair: str, target: Path, keep_all: bool) -> Counter:
    """Write NAME.en and NAME.PAIR; return the number of pairs kept and left out, by reason.

    Raises:
        ValueError: if a pair would be left out although all must be kept, or if no pair is left.
    """
    counts: Counter = Counter()
    paths = [Path(f"{target}.{language}") for language in ("en", pair)]
    parts = [path.with_name(path.name + ".part") for path in paths]
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        parts[0].open("w", encoding="utf-8", newline="\n") as source_file,
        parts[1].open("w", encoding="utf-8", newline="\n") as target_file,
    ):
        for number, result in enumerate(results, start=1):
            if isinstance(result, str):
                if keep_all:
                    raise ValueError(
                        f"{target}: pair {number} must be kept, but is unsuitable: {result}"
                    )
                counts[result] += 1
                continue
            counts["kept"] += 1
            source_file.write(result[0] + "\n")
            target_file.write(result[1] + "\n")
    if not counts["kept"]:
        raise ValueError(f"{target}: none of {counts.total()} pairs is left ({dict(counts)})")
    for part, path in zip(parts, paths, strict=True):
        part.rename(path)
    return counts


def transform_texts(
    title: str,
    make: Callable[[], Worker],
    texts: Sequence[Path],
    pair: str,
    target: Path,
    threads: int,
    keep_all: bool,
    expect: int | None,
) -> None:
    """Write the output of a cleaner or cutter, and print how many pairs were kept.

    Raises:
        ValueError: as in `read_pairs` and `write`, or if the number of pairs is not as expected.
    """
    results = transform(read_pairs(texts, pair), make, threads, f"{title} {target.name}")
    counts = write(results, pair, target, keep_all)
    kept = counts.pop("kept")
    reasons = "".join(f"; {count:,} left out: {reason}" for reason, count in counts.items())
    print(f"{target}: {kept:,} pairs{reasons}")
    if expect is not None and kept != expect:
        raise ValueError(f"{target} must have {expect} pairs, but has {kept}")


COMMON = (
    click.argument("texts", nargs=-1, required=True, type=Path),
    click.option("--pair", type=click.Choice(["de", "fr"]), required=True),
    click.option("--target", type=Path, required=True, help="Name of the output."),
    click.option("--threads", type=int, default=1, help="Number of processes."),
    click.option("--keep-all", is_flag=True, help="Do not leave out any pair."),
    click.option("--expect", type=int, help="Required number of pairs."),
)


def common_options(function: Callable) -> Callable:
    """Add the options that both commands share."""
    for option in reversed(COMMON):
        function = option(function)
    return function


@click.group(cls=Group)
def main() -> None:
    """Clean a parallel text and split it into pieces; NAME stands for NAME.en and NAME.PAIR."""


@main.command(
    cls=Command,
    examples="texts.py clean --pair fr --target text/train raw/europarl-v7 raw/commoncrawl",
)
@common_options
@click.option("--normalize", type=click.Choice(["source", "both", "none"]), default="source")
def clean(pair: str, normalize: str, **options: Any) -> None:
    """Remove control characters and superfluous spaces, and normalise punctuation."""
    transform_texts("clean", partial(Cleaner, pair, normalize), pair=pair, **options)


@main.command(
    cls=Command,
    examples="texts.py cut --pair fr --model spm.model --target pieces/train text/train",
)
@common_options
@click.option("--model", type=Path, required=True)
@click.option("--max-pieces", type=int, default=250)
@click.option("--max-ratio", type=float, default=1.5)
def cut(model: Path, max_pieces: int, max_ratio: float, keep_all: bool, **options: Any) -> None:
    """Split pairs into pieces."""
    load(model)  # before the workers do, so that a missing model gives one message
    make = partial(Cutter, model, max_pieces, max_ratio, keep_all)
    transform_texts("cut", make, keep_all=keep_all, **options)


if __name__ == "__main__":
    main()
