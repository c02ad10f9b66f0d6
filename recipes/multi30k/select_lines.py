#!/usr/bin/env python3
"""Write the lines of a monolingual text, except lines that occur in texts to be scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from nmt_moe.cli import command
from nmt_moe.text.lines import read_lines


def normalise(line: str) -> str:
    """Return a line in lower case, without its final full stop and surplus spaces."""
    return " ".join(line.lower().split()).rstrip(" .")


def select(lines: Iterable[str], held_back: Iterable[str]) -> Iterator[str]:
    """Yield the lines that are not blank and, whatever their case, not among `held_back`."""
    forbidden = {normalise(line) for line in held_back}
    for line in lines:
        text = " ".join(line.split())
        if text and normalise(text) not in forbidden:
            yield text


@command("select_lines.py", "select_lines.py captions.de.gz --without val.de --output mono.de")
@click.argument("text", type=Path)
@click.option(
    "--without",
    type=Path,
    multiple=True,
    help="Text to score on; its lines are left out. Repeatable.",
)
@click.option("--output", type=Path, required=True, help="File to write.")
def main(text: Path, without: Sequence[Path], output: Path) -> None:
    """Write the lines of TEXT (plain, .gz or .xz), without blank lines and those of other files."""
    held_back = [line for path in without for line in read_lines(path)]
    lines = list(read_lines(text, allow_controls=True))
    selected = list(select(lines, held_back))
    if not selected:
        raise ValueError(f"{text}: no line is left to translate. Name a text from another source.")
    output.write_text("".join(line + "\n" for line in selected), encoding="utf-8")
    print(f"{output}: {len(selected)} of {len(lines)} lines")


if __name__ == "__main__":
    main()
