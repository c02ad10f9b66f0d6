"""Translate files of text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from nmt_moe.inference.translator import READ_AHEAD, Translator
from nmt_moe.text.lines import BadLine, open_bytes, open_output, scan_lines


def translate_file(
    translator: Translator,
    source: Path | str,
    output: Path | str,
    target_lang: str | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> int:
    """Translate a file with one text per line, compressed if its name ends in `.gz` or `.xz`.

    Args:
        translator: The translator.
        source: File to read; it is not held in memory.
        output: File to write, with the same number of lines; it appears only once it is complete.
        target_lang: Target language of a multilingual model.
        progress: Whether to show a progress bar on standard error.
        options: Further options of `Translator.translate`.

    Returns:
        The number of lines.

    Raises:
        ValueError: if lines could not be translated; the message names them. Even then, the output
            is complete and has blank lines for them.
        OSError: if a file cannot be read or written.
    """
    faults: list[BadLine] = []
    count = 0
    with open_bytes(source) as stream, open_output(output) as file:
        lines = scan_lines(stream, os.fspath(source))
        shown = show_progress(lines, count_ends(source), progress)
        for result in translator.translate_lines(shown, target_lang, **options):
            count += 1
            if isinstance(result, BadLine):
                faults.append(result)
            file.write("\n" if isinstance(result, BadLine) else result.text + "\n")
    if faults:
        raise ValueError(
            f"`{source}`: {describe_faults(faults)} `{output}` has blank lines for them, and the "
            "translations of all others."
        )
    return count


def show_progress(
    lines: Iterable[str | BadLine], total: int | None, is_shown: bool
) -> Iterator[str | BadLine]:
    """Yield lines, and show a progress bar on standard error."""
    yield from tqdm(lines, total=total, unit=" lines", disable=not is_shown, smoothing=0.1)


def count_ends(source: Path | str) -> int | None:
    """Return the number of lines of a plain file, or None for a compressed file or a pipe."""
    if os.fspath(source).endswith((".gz", ".xz")) or not os.path.isfile(source):
        return None
    with open(source, "rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))


def describe_faults(faults: list[BadLine], most: int = 10) -> str:
    """Return a message that names bad lines."""
    named = [f"line {one.number} {one.reason}. {one.advice}" for one in faults[:most]]
    more = len(faults) - len(named)
    return " ".join([*named, f"{more} more lines are bad."] if more else named)


def scan_stream(stream: BinaryIO, name: str) -> tuple[Iterator[str | BadLine], int]:
    """Return the lines of a stream and the number to read ahead, which is 1 for a terminal."""
    is_terminal = stream.isatty()
    return scan_lines(stream, name), 1 if is_terminal else READ_AHEAD
