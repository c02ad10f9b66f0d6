#!/usr/bin/env python3
"""Write `train`, `valid` and `test` from texts with one sentence or paragraph per line.

Texts that are missing, empty, truncated, not UTF-8 or not split into sentences are rejected; the
error names the file and line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from nmt_moe.cli import command
from nmt_moe.text.lines import read_lines

# A longer line means that the text was not split into sentences or paragraphs.
MAX_LINE_WORDS = 3000


def find_text(folder: Path, name: str) -> Path:
    """Return the path of a text, which may be compressed.

    Raises:
        ValueError: if the folder or the text is missing.
    """
    if not folder.is_dir():
        raise ValueError(
            f"TEXT_DIR={folder} is not a folder. Name the folder that contains {name}."
        )
    for ending in ("", ".gz", ".xz"):
        if (folder / (name + ending)).is_file():
            return folder / (name + ending)
    raise ValueError(f"TEXT_DIR={folder} has no {name}, {name}.gz or {name}.xz")


def read_sentences(path: Path) -> list[str]:
    """Return the lines of a text that are not blank.

    Raises:
        ValueError: if the file is not text with one sentence per line; the message names the line.
    """
    sentences = []
    for number, line in enumerate(read_lines(path, allow_controls=True), 1):
        words = line.split()
        if len(words) > MAX_LINE_WORDS:
            raise ValueError(
                f"{path}: line {number} must have at most {MAX_LINE_WORDS} words, but it has "
                f"{len(words)}. Put each sentence on its own line, or split it with `fold -s`."
            )
        if words:
            sentences.append(" ".join(words))
    if not sentences:
        raise ValueError(f"{path}: the text is empty")
    return sentences


def split_text(
    trains: Sequence[Path], valid: Path | None, test: Path, valid_lines: int, output: Path
) -> dict[str, int]:
    """Write `train`, `valid` and `test`; without `valid`, use the end of the training text.

    Returns:
        The number of words and end marks of each file.

    Raises:
        ValueError: if a text cannot be used, or nothing would be left to train on.
    """
    sentences = [line for path in trains for line in read_sentences(path)]
    if valid is None:
        if len(sentences) <= valid_lines:
            raise ValueError(
                f"{trains[-1]}: must have more than VALID_LINES = {valid_lines} lines, but has "
                f"{len(sentences)}. Lower VALID_LINES, or set VALID to another file."
            )
        sentences, chosen = sentences[:-valid_lines], sentences[-valid_lines:]
    else:
        chosen = read_sentences(valid)
    parts = {"train": sentences, "valid": chosen, "test": read_sentences(test)}
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        (output / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return {name: sum(len(line.split()) + 1 for line in lines) for name, lines in parts.items()}


@command(
    "split_text.py",
    "split_text.py --folder text --train train.en --test val.en --valid-lines 5000 --output work",
)
@click.option("--folder", type=Path, required=True, help="Folder of the text.")
@click.option(
    "--train",
    multiple=True,
    required=True,
    help="File in the folder, plain, .gz or .xz; repeatable.",
)
@click.option(
    "--valid",
    default="",
    help="File of the validation set; if empty, the last lines of the last --train.",
)
@click.option("--test", required=True, help="File of the test set.")
@click.option(
    "--valid-lines",
    type=int,
    required=True,
    help="Lines of the validation set if --valid is empty.",
)
@click.option("--output", type=Path, required=True, help="Folder to write.")
def main(
    folder: Path, train: Sequence[str], valid: str, test: str, valid_lines: int, output: Path
) -> None:
    """Write train, valid and test from texts with one sentence or paragraph per line."""
    trains = [find_text(folder, name) for name in train]
    chosen = find_text(folder, valid) if valid else None
    for name, words in split_text(
        trains, chosen, find_text(folder, test), valid_lines, output
    ).items():
        print(f"{name}: {words} words, including end marks")


if __name__ == "__main__":
    main()
