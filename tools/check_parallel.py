#!/usr/bin/env python3
"""Check that text files are UTF-8 and have the same number of lines, none of them empty.

Only the line feed ends a line, as in fairseq: other separators of Unicode stay inside their line.
A name that ends in .gz is read through gzip.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a plain or gzipped file, without their line feed.

    Raises:
        ValueError: the file is missing, or is no whole gzip file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                yield line.removesuffix(b"\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None


def count_good_lines(path: Path, allow_empty: bool = False) -> int:
    """Count the lines of one file.

    Raises:
        ValueError: a line is not UTF-8, or is empty; the message names file and line.
    """
    number = 0
    for number, line in enumerate(read_lines(path), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: line {number}, byte {error.start + 1}: not UTF-8 ({error.reason}). "
                "Convert the file, for example with iconv -t UTF-8."
            ) from None
        if not text.strip() and not allow_empty:
            raise ValueError(f"{path}: line {number} is empty. Remove it from every side.")
    if number == 0:
        raise ValueError(f"{path}: the file has no lines")
    return number


def check_parallel(paths: Iterable[Path], allow_empty: bool = False) -> int:
    """Return the number of lines that all files share.

    Raises:
        ValueError: a file is unreadable (see `count_good_lines`), or two files differ in length.
    """
    counts = {path: count_good_lines(path, allow_empty) for path in paths}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{path} has {count}" for path, count in counts.items())
        shortest = min(counts.values())
        raise ValueError(
            f"the files must have the same number of lines, but {listed}: line {shortest + 1} is "
            "the first without a partner. Find the pair that shifted, or cut all files alike."
        )
    return next(iter(counts.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="the two or more sides of one corpus")
    parser.add_argument("--allow-empty", action="store_true", help="accept lines without text")
    arguments = parser.parse_args()
    try:
        count = check_parallel(arguments.files, arguments.allow_empty)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{count} lines: {' '.join(path.name for path in arguments.files)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
