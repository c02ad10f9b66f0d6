"""Draw training curves with matplotlib.

Source: Shazeer et al. 2017, Figure 2 and Table 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmt_moe.scoring.logs import Run

LOSSES = ["train_inner.nll_loss", "train.nll_loss", "valid.nll_loss"]
# Title of a panel, and the columns drawn in it.
PANELS = [
    ("loss, bits per token", LOSSES),
    ("perplexity, validation", ["valid.ppl"]),
    ("CV of importance", ["train_inner.moe_cv_importance", "train.moe_cv_importance"]),
    ("CV of load", ["train_inner.moe_cv_load", "train.moe_cv_load"]),
    ("largest load / mean load", ["train_inner.moe_max_load", "train.moe_max_load"]),
]


def draw(runs: Sequence[Run], output: Path, title: str = "") -> None:
    """Write the panels as a PNG image.

    Raises:
        ValueError: if matplotlib is not installed, or there is nothing to draw.
    """
    panels = [panel for panel in PANELS if any(run.curve(panel[1])[0] for run in runs)]
    if not panels:
        raise ValueError("no log has a column to draw")
    figure = make_figure(4.2 * len(panels), 3.6)
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, columns) in zip(all_axes, panels, strict=True):
        draw_panel(axes, name, columns, runs)
    figure.savefig(output, format="png", dpi=120)


def draw_panel(axes: Any, name: str, columns: Sequence[str], runs: Sequence[Run]) -> None:
    """Draw one panel, with a colour for each run; training is dashed if there is validation."""
    trained = [column for column in columns if column.startswith("train")]
    validated = [column for column in columns if column.startswith("valid")]
    for index, run in enumerate(runs):
        colour = f"C{index}"
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


def make_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure; width and height are in inches.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "drawing needs matplotlib, which is not installed: pip install 'nmt-moe[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
