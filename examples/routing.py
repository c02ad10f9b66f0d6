"""Draw a translation with each piece's attention and the experts used in encoder and decoder.

python examples/routing.py BUNDLE "A sentence." --output routing.png
"""

import argparse
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nmt_moe import Translator
from nmt_moe.inference import Translation

ATTENTION, ROUTING = "Blues", "Oranges"


def gate_matrix(experts: list[list[tuple[int, float]]], num_experts: int) -> np.ndarray:
    """Return a matrix (pieces, experts) of gates; experts that were not chosen have gate 0."""
    gates = np.zeros((len(experts), num_experts))
    for row, chosen in zip(gates, experts, strict=True):
        for expert, gate in chosen:
            row[expert] = gate
    return gates


def draw(translation: Translation, num_experts: int) -> Figure:
    """Draw the first sentence of a translation that was computed with `with_experts=True`."""
    [sentence, *_] = translation.sentences
    best = sentence.hypotheses[0]
    attention = best.attention.numpy()[:, : len(sentence.pieces)]
    read = gate_matrix(sentence.experts or [], num_experts)[: len(sentence.pieces)]
    written = gate_matrix(best.experts or [], num_experts)[: len(best.pieces)]
    rows, columns = attention.shape
    scale = 0.23  # inches per square
    widths, heights = [columns, num_experts], [num_experts, rows]
    size = scale * sum(widths) + 1.8, scale * sum(heights) + 1.5
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=widths, height_ratios=heights)
    top, middle, right = (figure.add_subplot(grid[place]) for place in ((0, 0), (1, 0), (1, 1)))
    show(middle, attention, ATTENTION, sentence.pieces, best.pieces, "")
    show(top, read.T, ROUTING, [], range(num_experts), "experts that read")
    show(right, written, ROUTING, range(num_experts), [], "experts that wrote")
    middle.set_xticklabels(sentence.pieces, rotation=60, ha="right", rotation_mode="anchor")
    return figure


def show(
    axes: Axes, values: np.ndarray, colours: str, columns: Iterable, rows: Iterable, title: str
) -> None:
    """Draw a matrix as squares, with column names below it and row names on its left."""
    columns, rows = list(columns), list(rows)
    axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9)
    axes.set_xticks(np.arange(values.shape[1]) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0]) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="folder written by nmt-moe export")
    parser.add_argument("text")
    parser.add_argument("--output", required=True, help="picture file to write")
    args = parser.parse_args()
    translator = Translator.load(args.bundle)
    [translation] = translator.translate(args.text, with_experts=True)
    num_experts = max(layer.config.num_experts for layer in translator.moe_layers.values())
    draw(translation, num_experts).savefig(args.output, dpi=100)
    print(translation.text)


if __name__ == "__main__":
    main()
