#!/usr/bin/env python3
"""Compare the scores of single, dense and MoE models in tables: table.py WORK.

The program reads WORK/RUN/scores.tsv of every run. Its columns are the model, the direction, the
perplexity on valid, and BLEU, chrF and BLEU against all references (or -) on the test set. The
program prints one row for each direction, like Table 5 of Shazeer et al. 2017.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from nmt_moe.cli import command
from nmt_moe.scoring.measures import compare, make_measures, read_texts, validation_tokens
from recipes.curves import draw_perplexity

DENSE = ("dense", "deep")
MODELS = ("single", *DENSE, "moe")
HEADINGS = {
    "single": "single pair",
    "dense": "multilingual dense, wider",
    "deep": "multilingual dense, deeper",
    "moe": "multilingual MoE",
}
MISSING = "not trained"
SAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """The scores of one run in one direction.

    Attributes:
        run: Folder of the run.
        perplexity: Perplexity on valid.
        bleu: BLEU on the test set, against one reference.
        chrf: chrF on the test set.
        bleu_all: BLEU against all references, or None if each sentence has only one.
    """

    run: Path
    perplexity: float
    bleu: float
    chrf: float
    bleu_all: float | None


Scores = dict[tuple[str, str], Score]


def read_scores(folder: Path) -> Scores:
    """Return the scores by (model, direction), from the run that was scored last.

    Raises:
        ValueError: if a line has other columns.
    """
    scores = {}
    for path in sorted(folder.glob("*/scores.tsv"), key=lambda path: path.stat().st_mtime):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            columns = line.split()
            if len(columns) != 6 or columns[0] not in MODELS:
                raise ValueError(
                    f"{path}, line {number}: must have model, direction, perplexity, BLEU, chrF "
                    f"and BLEU against all references, but is '{line}'; run evaluate.sh again"
                )
            perplexity, bleu, chrf = map(float, columns[2:5])
            bleu_all = None if columns[5] == "-" else float(columns[5])
            scores[columns[0], columns[1]] = Score(path.parent, perplexity, bleu, chrf, bleu_all)
    return scores


def reference_path(folder: Path, split: str, direction: str, language: str) -> Path:
    """Return the text of one side of a direction; file names start with English."""
    one, other = direction.split("-")
    names = [f"text/{split}.{pair}.{language}" for pair in (f"{one}-{other}", f"{other}-{one}")]
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def count_pairs(folder: Path, direction: str) -> str:
    """Return the number of training sentences of a direction."""
    path = reference_path(folder, "train", direction, direction.split("-")[0])
    return f"{sum(1 for _ in path.open('rb')):,}" if path.is_file() else "-"


def better_dense(scores: Scores, directions: Sequence[str]) -> str | None:
    """Return the dense model with the lower mean perplexity on valid, or None if none is scored."""

    def mean(model: str) -> float:
        return statistics.fmean(scores[model, direction].perplexity for direction in directions)

    complete = [model for model in DENSE if all((model, one) in scores for one in directions)]
    return min(complete, key=mean, default=None)


def probability(folder: Path, direction: str, one: Score, other: Score) -> str:
    """Return p of a paired bootstrap of two runs' BLEU, or "-" without their translations."""
    target = direction.split("-")[1]
    paths = [run / f"translations/test.{direction}" for run in (one.run, other.run)]
    paths.append(reference_path(folder, "test", direction, target))
    if not all(path.is_file() for path in paths):
        return "-"
    this, that, reference = read_texts(paths)
    (measure,) = (
        measure
        for measure in make_measures(target, validation_tokens(target))
        if measure.name.startswith("sacrebleu")
    )
    return f"{compare(measure, this, that, [reference], SAMPLES)['p']:.3f}"


def difference(one: Score | None, other: Score | None) -> str:
    """Return the difference in BLEU, or "-" if a score is missing."""
    return f"{one.bleu - other.bleu:+.2f}" if one and other else "-"


def make_tables(folder: Path) -> tuple[list[str], list[str]]:
    """Return two tables in Markdown: BLEU with perplexity, and chrF with BLEU on all references.

    The model with experts is compared with the better dense model.
    """
    scores = read_scores(folder)
    directions = list(dict.fromkeys(direction for _, direction in scores))
    models = [model for model in MODELS if any((model, one) in scores for one in directions)]
    titles = [HEADINGS[model] for model in models]
    dense = better_dense(scores, directions)
    against = HEADINGS[dense].removeprefix("multilingual ") if dense else "dense"
    head = ["direction", "training pairs", *titles, f"MoE - {against}", "p", "MoE - single"]
    rows = []
    for direction in directions:
        found = {model: scores.get((model, direction)) for model in MODELS}
        moe, other = found["moe"], found.get(dense or "")
        cells = [_cell(found[model], "{0.bleu:.2f} ({0.perplexity:.2f})") for model in models]
        p = probability(folder, direction, moe, other) if moe and other else "-"
        gains = [difference(moe, other), p, difference(moe, found["single"])]
        rows.append([direction, count_pairs(folder, direction), *cells, *gains])
    rows.append(_mean_row(scores, directions, models, dense))
    further = [
        [direction, *(_further(scores.get((model, direction))) for model in models)]
        for direction in directions
    ]
    return _markdown([head, *rows]), _markdown([["direction", *titles], *further])


def _cell(score: Score | None, form: str) -> str:
    return form.format(score) if score else MISSING


def _further(score: Score | None) -> str:
    if score is None:
        return MISSING
    return f"{score.chrf:.2f}" + ("" if score.bleu_all is None else f" ({score.bleu_all:.2f})")


def _mean_row(
    scores: Scores, directions: Sequence[str], models: Sequence[str], dense: str | None
) -> list[str]:
    """Return means over all directions, for models that were scored in all of them."""
    means = {}
    for model in models:
        found = [scores[model, one] for one in directions if (model, one) in scores]
        if len(found) == len(directions):
            perplexity = statistics.fmean(score.perplexity for score in found)
            means[model] = (statistics.fmean(score.bleu for score in found), perplexity)
    cells = [f"{means[m][0]:.2f} ({means[m][1]:.2f})" if m in means else "-" for m in models]
    gains = [
        f"{means['moe'][0] - means[other][0]:+.2f}" if {"moe", other} <= means.keys() else "-"
        for other in (dense or "", "single")
    ]
    return ["mean", "", *cells, gains[0], "", gains[1]]


def _markdown(rows: Iterable[Sequence[str]]) -> list[str]:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|---" * (head.count("|") - 1) + "|", *rest]


def training_logs(scores: Scores) -> dict[str, list[Path]]:
    """Return the logs of the multilingual models."""
    runs = {model: score.run for (model, _), score in scores.items() if model != "single"}
    logs = {model: run / "train.log" for model, run in runs.items()}
    return {HEADINGS[model]: [log] for model, log in logs.items() if log.is_file()}


@command("table.py", "table.py work --figure updates.png")
@click.argument("work", type=Path)
@click.option("--figure", type=Path, help="Image of perplexity during training to write.")
def main(work: Path, figure: Path | None) -> None:
    """Print tables that compare the scores of all models in the folder WORK."""
    scores = read_scores(work)
    if not scores:
        raise ValueError(f"no run in {work} was scored; run evaluate.sh")
    first, second = make_tables(work)
    print("Test BLEU (in brackets: perplexity on valid)\n", *first, sep="\n")
    print("\nTest chrF (in brackets: BLEU against all references)\n", *second, sep="\n")
    if figure is not None:
        draw_perplexity(training_logs(scores), figure)


if __name__ == "__main__":
    main()
