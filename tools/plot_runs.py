#!/usr/bin/env python3
"""Draw loss, perplexity and balance of one or more trainings from their JSON logs.

    fairseq-train ... --log-format json > moe.log 2>&1
    plot_runs.py --output runs.png moe.log dense.log
    plot_runs.py --output runs.png "32 experts=moe.log" "dense=dense.log"

One panel each: training loss (bits a token, dashed) with that of validation (solid), perplexity of
validation, and the columns of the paper's Table 6: CV of importance, CV of load, largest load over
mean load. A run without a column is left out of its panel. With --sampled-softmax the training loss
is an estimate, too low on average, and the legend says so. Resumed logs can be joined: of two
entries for one update, the later counts. Drawing needs matplotlib: pip install 'nmt-moe[plot]'.

Runs are named by LABEL, else by their file, with as many of its folders as tell them apart.

Source: Shazeer et al. 2017, Figure 2 and Table 6.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOSSES = ["train_inner.nll_loss", "train.nll_loss", "valid.nll_loss"]
# Title, and the columns drawn in a panel.
PANELS = [
    ("loss, bits per token", LOSSES),
    ("perplexity, validation", ["valid.ppl"]),
    ("CV of importance", ["train_inner.moe_cv_importance", "train.moe_cv_importance"]),
    ("CV of load", ["train_inner.moe_cv_load", "train.moe_cv_load"]),
    ("largest load / mean load", ["train_inner.moe_max_load", "train.moe_max_load"]),
]
SPLITS = ("train", "valid")
TRAINING = ("train_inner", "train")  # within an epoch and at its end


@dataclass
class Run:
    """The entries of one log.

    Attributes:
        label: Its name in the legend.
        columns: For each column, such as `valid.ppl`, its value at each number of updates.
    """

    label: str
    columns: dict[str, dict[int, float]] = field(default_factory=dict)

    def curve(self, names: Sequence[str]) -> tuple[list[int], list[float]]:
        """Give the points of the first of `names` that was logged, by rising update."""
        points = next((self.columns[name] for name in names if name in self.columns), {})
        updates = sorted(points)
        return updates, [points[update] for update in updates]

    @property
    def is_estimated(self) -> bool:
        """Whether the training loss is estimated from a sample of the classes."""
        return any(f"{split}.sampled_softmax" in self.columns for split in TRAINING)


def read_run(label: str, lines: Iterable[str]) -> Run:
    """Collect the entries of a log, whatever stands around them."""
    run = Run(label)
    for line in lines:
        entry = parse_entry(line)
        split = next((name for name in SPLITS if f"{name}_num_updates" in entry), "train_inner")
        prefix = "" if split == "train_inner" else f"{split}_"
        update = as_number(entry.get(f"{prefix}num_updates"))
        if update is None:
            continue
        for key, value in entry.items():
            number = as_number(value)
            if key.startswith(prefix) and number is not None:
                points = run.columns.setdefault(f"{split}.{key[len(prefix) :]}", {})
                points[int(update)] = number
    return run


def parse_entry(line: str) -> dict[str, Any]:
    """Give the JSON object that ends a line; empty if there is none."""
    try:
        entry = json.loads(line[line.index('{"') :])
    except ValueError:  # no brace, or another thing than JSON after it
        return {}
    return entry if isinstance(entry, dict) else {}


def as_number(value: Any) -> float | None:
    """Read a number, which fairseq writes as text; None for another thing, or if not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_runs(names: Sequence[str]) -> list[Run]:
    """Read each FILE or LABEL=FILE.

    Raises:
        ValueError: naming the file that is missing or no log.
    """
    given = []
    for name in names:
        label, path = "", name
        if not Path(name).exists():
            label, _, path = name.rpartition("=")
        given.append((label, Path(path)))
    unnamed = name_files([file for label, file in given if not label])
    return [read_file(label or unnamed[file], file) for label, file in given]


def name_files(files: Sequence[Path]) -> dict[Path, str]:
    """Name files by their stems, or by the shortest ends of their paths that differ."""
    names = {file: file.stem for file in files}
    parts = {file: Path(os.path.abspath(file)).parts for file in files}
    for file, own in parts.items():
        # One file that is written in two ways differs nowhere.
        others = [other for at, other in parts.items() if at.stem == file.stem and other != own]
        if others:
            end = 1
            while any(other[-end:] == own[-end:] for other in others):
                end += 1
            names[file] = str(Path(*own[-end:]))
    return names


def read_file(label: str, file: Path) -> Run:
    """Read one log.

    Raises:
        ValueError: naming the file, if it is missing or no log.
    """
    if not file.exists():
        raise ValueError(f"{file}: no such file")
    if file.is_dir():
        raise ValueError(f"{file}: is a folder; name the log in it")
    with file.open(encoding="utf-8", errors="replace") as lines:
        run = read_run(label, lines)
    if not run.columns:
        raise ValueError(f"{file}: holds no entry of fairseq's `--log-format json`")
    return run


def check_output(output: Path) -> None:
    """Refuse, before anything is read, a file that cannot be written.

    Raises:
        ValueError: naming the folder that is missing.
    """
    if not output.parent.is_dir():
        raise ValueError(
            f"`--output` must be in a folder that exists, but is {output}. "
            f"Make `{output.parent}` first."
        )


def draw(runs: Sequence[Run], output: Path, title: str = "") -> None:
    """Write the panels as PNG.

    Raises:
        ValueError: matplotlib is not installed, or there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "drawing needs matplotlib, which is not installed: pip install 'nmt-moe[plot]'"
        ) from error
    panels = [panel for panel in PANELS if any(run.curve(panel[1])[0] for run in runs)]
    if not panels:
        raise ValueError("no log has a column to draw")
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, columns) in zip(all_axes, panels, strict=True):
        draw_panel(axes, name, columns, runs)
    figure.savefig(output, format="png", dpi=120)


def draw_panel(axes: Any, name: str, columns: Sequence[str], runs: Sequence[Run]) -> None:
    """Draw one panel: a colour for each run, dashes where validation is drawn beside it."""
    trained = [column for column in columns if column.startswith("train")]
    validated = [column for column in columns if column.startswith("valid")]
    for at, run in enumerate(runs):
        colour = f"C{at}"
        style = "--" if validated else "-"
        if trained and run.curve(trained)[0]:
            label = None if validated else run.label
            if run.is_estimated and columns == LOSSES:
                label = f"{run.label}, training (estimate)"
            axes.plot(*run.curve(trained), style, color=colour, label=label)
        if validated and run.curve(validated)[0]:
            axes.plot(*run.curve(validated), "-o", color=colour, markersize=3, label=run.label)
    axes.set_title(name)
    axes.set_xlabel("updates")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", metavar="[LABEL=]FILE", help="a training's log")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="file to write")
    parser.add_argument("--title", default="", help="above the panels")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        check_output(args.output)
        runs = read_runs(args.logs)
        draw(runs, args.output, args.title)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print(f"{args.output}: {', '.join(run.label for run in runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
