#!/usr/bin/env python3
"""Clean a parallel text and cut it into pieces, on several cores, pair by pair and in order.

    texts.py clean --pair fr --target text/train raw/europarl-v7 raw/commoncrawl
    texts.py cut --pair fr --model spm.model --target pieces/train text/train

Each name stands for NAME.en and NAME.PAIR. Without --keep-all, pairs that cannot be trained on are
left out, and counted by reason.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import sentencepiece
from sacremoses import MosesPunctNormalizer

from nmt_moe.text.pieces import load
from recipes.downloads import show_progress

# Pairs a worker takes at once: about a tenth of a second of work.
CHUNK = 1000
CONTROL_SPACE = re.compile(r"[\t-\r\x1c-\x1f\x85]")
Pair = tuple[str, str]
# What a worker made of a pair: its new form, or why it is left out.
Result = Pair | str


class Cleaner:
    """Removes control characters and superfluous space, and normalises punctuation.

    normalize: "source" normalises the English side alone: references keep their typographic
        quotation marks, and so must what the model writes; "both", or "none".
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

    def __call__(self, pair: tuple[bytes, bytes]) -> Result:
        try:
            lines = [line.decode("utf-8") for line in pair]
        except UnicodeDecodeError:
            return "not UTF-8"
        # A tab is a control character too, and would vanish between two words.
        joined = [CONTROL_SPACE.sub(" ", line) for line in lines]
        source, target = (
            " ".join(clean(line).split()) for clean, line in zip(self.sides, joined, strict=True)
        )
        return (source, target) if source and target else "empty side"


class Cutter:
    """Cuts a pair into pieces; leaves out what is too long or whose sides differ too much."""

    def __init__(self, model: Path, max_pieces: int, max_ratio: float, keep_all: bool) -> None:
        self.processor: sentencepiece.SentencePieceProcessor = load(model)
        self.max_pieces = max_pieces
        self.max_ratio = max_ratio
        self.keep_all = keep_all

    def __call__(self, pair: tuple[bytes, bytes]) -> Result:
        source, target = (
            self.processor.encode(line.decode("utf-8"), out_type=str) for line in pair
        )
        shorter, longer = sorted((len(source), len(target)))
        if not self.keep_all:
            if shorter == 0:
                return "empty side"
            if longer > self.max_pieces:
                return f"over {self.max_pieces} pieces"
            if longer > self.max_ratio * shorter:
                return f"one side over {self.max_ratio} times the other"
        return " ".join(source), " ".join(target)


_work: Callable[[tuple[bytes, bytes]], Result]


def start_worker(make: Callable[[], Callable[[tuple[bytes, bytes]], Result]]) -> None:
    """Make a worker process's own cleaner or cutter."""
    global _work
    _work = make()


def work_on(chunk: list[tuple[bytes, bytes]]) -> list[Result]:
    return [_work(pair) for pair in chunk]


def read_pairs(names: list[Path], pair: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield the lines of both sides of all texts, without their end.

    Raises:
        ValueError: a file is missing, or the sides of a text differ in length.
    """
    for name in names:
        paths = [Path(f"{name}.{language}") for language in ("en", pair)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
        with paths[0].open("rb") as source, paths[1].open("rb") as target:
            try:
                for lines in zip(source, target, strict=True):
                    yield lines[0].rstrip(b"\r\n"), lines[1].rstrip(b"\r\n")
            except ValueError:
                raise ValueError(f"{name}: one side has more lines than the other") from None


def transform(
    pairs: Iterator[tuple[bytes, bytes]],
    make: Callable[[], Callable[[tuple[bytes, bytes]], Result]],
    threads: int,
    title: str,
) -> Iterator[Result]:
    """Yield what each pair becomes, in order.

    A round of chunks is read, worked on and written before the next: reading further ahead, as
    Pool.imap does, would bring the whole text into memory.
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
    """Write NAME.en and NAME.PAIR; return how many pairs were kept, and left out for what reason.

    Raises:
        ValueError: a pair would be left out though all must be kept, or none is left.
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
                    raise ValueError(f"{target}: pair {number} must be kept, but has: {result}")
                counts[result] += 1
                continue
            counts["kept"] += 1
            source_file.write(result[0] + "\n")
            target_file.write(result[1] + "\n")
    if not counts["kept"]:
        raise ValueError(f"{target}: no pair is left of {counts.total()} ({dict(counts)})")
    for part, path in zip(parts, paths, strict=True):
        part.rename(path)
    return counts


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("clean", "cut"):
        command = commands.add_parser(name)
        command.add_argument("texts", nargs="+", type=Path, help="names without their language")
        command.add_argument("--pair", choices=["de", "fr"], required=True)
        command.add_argument("--target", type=Path, required=True, help="name to write")
        command.add_argument("--threads", type=int, default=1, help="processes")
        command.add_argument("--keep-all", action="store_true", help="leave no pair out")
        command.add_argument("--expect", type=int, help="pairs that must be there")
        if name == "clean":
            command.add_argument(
                "--normalize", choices=["source", "both", "none"], default="source"
            )
        else:
            command.add_argument("--model", type=Path, required=True)
            command.add_argument("--max-pieces", type=int, default=250)
            command.add_argument("--max-ratio", type=float, default=1.5)
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "clean":
        make = partial(Cleaner, arguments.pair, arguments.normalize)
    else:
        load(arguments.model)  # here, where a missing model is one message
        limits = (arguments.max_pieces, arguments.max_ratio, arguments.keep_all)
        make = partial(Cutter, arguments.model, *limits)
    results = transform(
        read_pairs(arguments.texts, arguments.pair),
        make,
        arguments.threads,
        f"{arguments.command} {arguments.target.name}",
    )
    counts = write(results, arguments.pair, arguments.target, arguments.keep_all)
    kept = counts.pop("kept")
    reasons = "".join(f"; {count:,} left out: {reason}" for reason, count in counts.items())
    print(f"{arguments.target}: {kept:,} pairs{reasons}")
    if arguments.expect is not None and kept != arguments.expect:
        raise ValueError(f"{arguments.target} must have {arguments.expect} pairs, but has {kept}")


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
