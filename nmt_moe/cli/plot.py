"""`nmt-moe plot`: curves of trainings."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.scoring import plots
from nmt_moe.scoring.logs import read_runs


@command(
    "plot",
    """
fairseq-train ... --log-format json > moe.log 2>&1
nmt-moe plot moe.log dense.log --output runs.png
nmt-moe plot "32 experts=moe.log" "dense=dense.log" --output runs.png
""",
)
@click.argument("logs", nargs=-1, required=True, metavar="[LABEL=]LOG...")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="PNG to write.")
@click.option("--title", default="", help="Text above the panels.")
def plot(logs: tuple[str, ...], output: Path, title: str) -> None:
    """Draw trainings from their JSON logs.

    One panel each: training loss (bits a token, dashed) with that of validation (solid), perplexity
    of validation, and the columns of the paper's Table 6: CV of importance, CV of load, largest
    load over mean load. A run without a column is left out of its panel. With --sampled-softmax the
    training loss is an estimate, too low on average, and the legend says so. Resumed logs can be
    joined: of two entries for one update, the later counts.

    Runs are named by LABEL, else by their file, with as many of its folders as tell them apart.
    Drawing needs matplotlib: pip install 'nmt-moe[plot]'.
    """
    plots.check_output(output)
    runs = read_runs(logs)
    plots.draw(runs, output, title)
    click.echo(f"{output}: {', '.join(run.label for run in runs)}")
