#!/usr/bin/env python3
"""Compare the scores of single, dense and MoE models in a table: table.py WORK.

The program reads WORK/RUN/scores.tsv of every run. Its columns are the model, the direction, the
perplexity on valid, and BLEU and chrF on the test set. The program prints one row for each
direction, like Table 5 of Shazeer et al. 2017.
"""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli import command

MODELS = ("single", "dense", "moe")
HEADINGS = {"single": "single pair", "dense": "multilingual dense", "moe": "multilingual MoE"}
MISSING = "not trained"


def read_scores(folder: Path) -> dict[tuple[str, str], tuple[str, str, str]]:
    """Return perplexity, BLEU and chrF by (model, direction), from the run that was scored last.

    Raises:
        ValueError: if a line has other columns.
    """
    scores = {}
    for path in sorted(folder.glob("*/scores.tsv"), key=lambda path: path.stat().st_mtime):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            columns = line.split()
            if len(columns) != 5 or columns[0] not in MODELS:
                raise ValueError(
                    f"{path}, line {number}: must have model, direction, perplexity, BLEU and "
                    f"chrF, but is '{line}'; run evaluate.sh again"
                )
            scores[columns[0], columns[1]] = (columns[2], columns[3], columns[4])
    return scores


def count_pairs(folder: Path, direction: str) -> str:
    """Return the number of training sentences of a direction; file names start with English."""
    one, other = direction.split("-")
    for pair in (f"{one}-{other}", f"{other}-{one}"):
        path = folder / f"text/train.{pair}.{one}"
        if path.is_file():
            return f"{sum(1 for _ in path.open('rb')):,}"
    return "-"


def make_table(folder: Path) -> list[str]:
    """Return the rows in Markdown: BLEU, with perplexity in brackets."""
    scores = read_scores(folder)
    directions = list(dict.fromkeys(direction for _, direction in scores))
    titles = [HEADINGS[model] for model in MODELS]
    lines = [
        "| direction | training pairs | " + " | ".join(titles) + " | MoE - dense | MoE - single |",
        "|---" * 7 + "|",
    ]
    for direction in directions:
        found = {model: scores.get((model, direction)) for model in MODELS}
        cells = [f"{row[1]} ({row[0]})" if row else MISSING for row in found.values()]
        gains = [difference(found["moe"], found[model]) for model in ("dense", "single")]
        row = [direction, count_pairs(folder, direction), *cells, *gains]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def difference(one: tuple | None, other: tuple | None) -> str:
    """Return the difference in BLEU, or "-" if a score is missing."""
    return f"{float(one[1]) - float(other[1]):+.2f}" if one and other else "-"


@command("table.py", "table.py work")
@click.argument("work", type=Path)
def main(work: Path) -> None:
    """Print a table that compares the scores of all models in the folder WORK."""
    lines = make_table(work)
    if len(lines) == 2:
        raise ValueError(f"no run in {work} was scored; run evaluate.sh")
    print("Test BLEU (in brackets: perplexity on valid)\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
