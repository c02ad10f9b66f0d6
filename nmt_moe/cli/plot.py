"""`nmt-moe plot`: draw training curves."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.cli._paths import NEW_FILE
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
@click.option("--output", type=NEW_FILE, required=True, help="PNG to write.")
@click.option("--title", default="", help="Text above the panels.")
def plot(logs: tuple[str, ...], output: Path, title: str) -> None:
    """Draw the curves of training runs from their JSON logs.

    There is one panel for training loss (dashed) and validation loss (solid) in bits per token, one
    for validation perplexity, and one for each column of the paper's Table 6: CV of importance, CV
    of load, and largest load divided by mean load. If a run's log lacks a column, the run is left
    out of the panel for that column. With --sampled-softmax, the training loss is an estimate that
    is too low on average, and the legend says so. The logs of a resumed run can be concatenated: if
    an update occurs twice, the later entry counts.

    A run is named by its LABEL, or else by its file, with as many parent folders as are needed to
    distinguish the runs. Plotting needs matplotlib: pip install 'nmt-moe[plot]'.
    """
    runs = read_runs(logs)
    plots.draw(runs, output, title)
    click.echo(f"{output}: {', '.join(run.label for run in runs)}")
