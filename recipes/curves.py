"""Draw perplexity against updates for the recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nmt_moe.scoring.logs import read_file
from nmt_moe.scoring.plots import make_figure


def draw_perplexity(logs: Mapping[str, Sequence[Path]], path: Path) -> None:
    """Write a PNG image with the perplexity on valid during training, on a logarithmic scale.

    Args:
        logs: Training logs by model. All runs of a model have the same colour.
        path: Image to write.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    figure = make_figure(6.4, 4.4)
    axes = figure.subplots()
    for number, (label, files) in enumerate(logs.items()):
        for index, file in enumerate(files):
            updates, bits = read_file(label, file).curve(["valid.nll_loss"])
            # A label that starts with _ has no entry in the legend.
            name = label if index == 0 else f"_{label}"
            axes.plot(updates, [2**value for value in bits], f"C{number}.-", label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("updates")
    axes.set_ylabel("perplexity on valid, per token")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, format="png", dpi=130)
