"""Check that texts are parallel, which means that lines with the same number belong together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from nmt_moe.text.lines import read_lines


def check_parallel(paths: Iterable[Path], allow_empty: bool = False) -> int:
    """Check that files are parallel, and return their number of lines.

    Raises:
        ValueError: if `read_lines` rejects a line, a line is empty, a file has no lines, or two
            files have different numbers of lines.
        OSError: if a file cannot be opened.
    """
    counts = {path: sum(1 for _ in read_good_lines(path, allow_empty)) for path in paths}
    for path, count in counts.items():
        if not count:
            raise ValueError(f"`{path}` has no lines. Name files with at least one line each.")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"`{path}` has {count}" for path, count in counts.items())
        raise ValueError(
            f"the files must have the same number of lines, but {listed}: line "
            f"{min(counts.values()) + 1} is the first without a counterpart. Find where "
            "the lines stop corresponding, or cut all files to the same length."
        )
    return next(iter(counts.values()))


def read_good_lines(path: Path, allow_empty: bool = False) -> Iterator[str]:
    """Yield the lines of a file after checking each.

    Raises:
        ValueError: if `read_lines` rejects a line, or a line is empty.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not allow_empty and not line.strip():
            raise ValueError(f"`{path}`, line {number} is empty. Remove it from every side.")
        yield line
