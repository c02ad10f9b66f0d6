#!/usr/bin/env python3
"""Compare the perplexity and capacity of small versions of the models in Figure 2 (left).

    capacity.py flags moe_16 --dim 64
    capacity.py report --work work --dim 64 --vocab-size 2000

All models of the same width cost about the same per token. Their widths are those in Table 7,
multiplied by --dim / 512.

Source: Shazeer et al. 2017, section 5.1, Figure 2 (left) and Table 7.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from nmt_moe.cli import Group, command
from nmt_moe.scoring.logs import read_entries
from nmt_moe.scoring.plots import make_figure
from nmt_moe.text.lines import read_lines
from recipes.curves import draw_perplexity

SPLITS = ("valid", "test")


def model_options(dim: int) -> dict[str, dict[str, Any]]:
    """Return the options of each model of width `dim`; Table 7 gives them for 512.

    A token uses 4 experts of 2 x D hidden units or, in dense models, a network with as many
    weights. At width 64, a flat gate for 256 experts would add a quarter to all operations, so the
    gate is hierarchical, as in the paper's MoE-256-h.
    """
    experts = {"hidden_dim": 2 * dim, "top_k": 4}
    rows: dict[str, dict[str, Any]] = {
        "lstm_4": {"dense": True, "lstm_layers": 4},
        "moe_1_wide": {"num_experts": 1, "top_k": 1, "hidden_dim": 8 * dim},
        "moe_1_deep": {
            **{"num_experts": 1, "top_k": 1, "hidden_dim": 2 * dim},
            "expert_layers": 4,
        },
        "moe_4": {"num_experts": 4, **experts},
        "moe_16": {"num_experts": 16, **experts},
        "moe_64": {"num_experts": 64, **experts},
        "moe_256h": {"num_experts": 256, **experts, "num_groups": 16, "top_k": 2},
        # The paper uses 16 groups of 64 experts. At a narrow width, gates for so many experts would
        # cost too much.
        "moe_1024h": {"num_experts": 1024, **experts, "num_groups": 32, "top_k": 2},
    }
    return {
        name: {"model_dim": dim, "lstm_hidden_dim": dim, **options}
        for name, options in rows.items()
    }


def as_flags(options: dict[str, Any]) -> list[str]:
    """Return options as fairseq-train arguments."""
    flags = []
    for name, value in options.items():
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags.append(str(value))
    return flags


@dataclass(frozen=True)
class Result:
    """The result of one training run: perplexity per token on valid and on test."""

    valid: float
    test: float


@dataclass(frozen=True)
class Row:
    """A model with its best dropout, and the perplexities of its seeds in order."""

    name: str
    ops: int
    params: int
    dropout: str
    valid: list[float]
    test: list[float]


@dataclass(frozen=True)
class Counts:
    """The sizes of a text: pieces with end marks, words, and characters without line breaks."""

    tokens: int
    words: int
    characters: int

    def per_word(self, perplexity: float) -> float:
        """Turn a perplexity per token into one per word, over the same loss."""
        return perplexity ** (self.tokens / self.words)

    def bits_per_character(self, perplexity: float) -> float:
        """Turn a perplexity per token into a loss in bits per character."""
        return math.log2(perplexity) * self.tokens / self.characters


def count(work: Path) -> Counts:
    """Count the pieces, words and characters of the test text."""
    tokens = sum(len(line.split()) + 1 for line in read_lines(work / "pieces" / "test"))
    lines = list(read_lines(work / "text" / "test"))
    return Counts(tokens, sum(len(line.split()) for line in lines), sum(map(len, lines)))


def read_result(log: Path) -> Result:
    """Read the perplexities at the last update from a JSON log, where losses are in bits.

    Raises:
        ValueError: if training has not finished.
    """
    found: dict[str, float] = {}
    for entry in read_entries(read_lines(log, allow_controls=True)):
        for split in SPLITS:
            if f"{split}_nll_loss" in entry:
                found[split] = 2 ** float(entry[f"{split}_nll_loss"])
    missing = [split for split in SPLITS if split not in found]
    if missing:
        splits = " and ".join(missing)
        raise ValueError(f"{log}: has no perplexity for {splits}. Run capacity/run.sh again.")
    return Result(**found)


def collect(work: Path) -> dict[str, dict[str, dict[str, Result]]]:
    """Return model -> dropout -> seed -> result, from `runs/MODEL/dropout-P/seed-S/train.log`.

    Raises:
        ValueError: if no run has finished.
    """
    found: dict[str, dict[str, dict[str, Result]]] = {}
    for log in sorted((work / "runs").glob("*/dropout-*/seed-*/train.log")):
        if (log.parent / "done").exists():
            seed, dropout = log.parent.name, log.parents[1].name.removeprefix("dropout-")
            results = found.setdefault(log.parents[2].name, {}).setdefault(dropout, {})
            results[seed] = read_result(log)
    if not found:
        raise ValueError(f"{work}/runs has no finished training run. Run recipes/capacity/run.sh.")
    return found


def choose_dropout(results: dict[str, dict[str, Result]]) -> str:
    """Return the dropout with the lowest mean perplexity on valid, regardless of test.

    Only seeds used with every dropout are compared, so that seeds cannot affect the choice.

    Raises:
        ValueError: if the dropouts have no seed in common.
    """
    seeds = set.intersection(*(set(of_seed) for of_seed in results.values()))
    if not seeds:
        raise ValueError(
            f"the dropouts {', '.join(results)} of a model have no seed in common, so the best "
            "cannot be determined. Run recipes/capacity/run.sh with one seed for all of them."
        )
    return min(results, key=lambda p: statistics.mean(results[p][seed].valid for seed in seeds))


def make_rows(
    found: dict[str, dict[str, dict[str, Result]]], dim: int, vocab_size: int
) -> list[Row]:
    """Return a row for each trained model, with its costs and perplexities."""
    from nmt_moe.models.lstm_moe_lm import LSTMMoELMConfig
    from nmt_moe.planning import make_card

    logging.disable(logging.INFO)  # fairseq, which has just been imported, enables all logging
    rows = []
    for name, options in model_options(dim).items():
        if name in found:
            card = make_card(name, LSTMMoELMConfig(**options).to_config(), vocab_size)
            dropout = choose_dropout(found[name])
            best = list(found[name][dropout].values())
            perplexities = [r.valid for r in best], [r.test for r in best]
            rows.append(Row(name, card.ops, card.params, dropout, *perplexities))
    return rows


def layout(rows: Sequence[Row], counts: Counts) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| model | ops/timestep | parameters | dropout | seeds | valid ppl | test ppl "
        "| test ppl per word | test bits per character |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.name, f"{row.ops:,}", f"{row.params:,}", row.dropout, str(len(row.test))]
        cells += [spread(row.valid), spread(row.test)]
        cells.append(f"{statistics.mean(map(counts.per_word, row.test)):.1f}")
        cells.append(f"{statistics.mean(map(counts.bits_per_character, row.test)):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Return the mean, followed by the range if there are several values."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw perplexity on test against parameters: the mean and the value of every seed.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    figure = make_figure(6.4, 4.4)
    axes = figure.subplots()
    has_gate = [row for row in rows if row.name not in ("lstm_4", "moe_1_wide", "moe_1_deep")]
    dense = [row for row in rows if row not in has_gate]
    for group, style, label in ((dense, "s", "dense"), (has_gate, "o-", "mixture of experts")):
        if group:
            means = [statistics.mean(row.test) for row in group]
            axes.plot([row.params for row in group], means, style, label=label)
    for row in rows:
        axes.plot([row.params] * len(row.test), row.test, "k_", markersize=6)
        axes.annotate(
            row.name, (row.params, statistics.mean(row.test)), (6, 5), textcoords="offset points"
        )
    axes.set_xscale("log")
    axes.set_xlabel("parameters, without embedding and softmax")
    axes.set_ylabel("perplexity on test, per token")
    axes.margins(x=0.25, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def training_logs(rows: Sequence[Row], work: Path) -> dict[str, list[Path]]:
    """Return the logs of every seed at its model's best dropout, by model."""
    folders = {row.name: work / "runs" / row.name / f"dropout-{row.dropout}" for row in rows}
    return {name: sorted(folder.glob("*/train.log")) for name, folder in folders.items()}


# Command line


@click.group(cls=Group)
def main() -> None:
    """Print the flags of models of growing capacity, or write their table and figures."""


DIM = click.option("--dim", type=int, required=True, help="Width of all layers.")


@command("flags", "capacity.py flags moe_16 --dim 64")
@click.argument("model")
@DIM
def flags(model: str, dim: int) -> None:
    """Print a model's flags for fairseq-train."""
    models = model_options(dim)
    if model not in models:
        raise ValueError(f"MODELS must be among {', '.join(models)}, but contains '{model}'")
    print(" ".join(as_flags(models[model])))


@command("report", "capacity.py report --work work --dim 64 --vocab-size 2000")
@click.option("--work", type=Path, required=True, help="Folder of the runs.")
@DIM
@click.option("--vocab-size", type=int, required=True, help="Number of dictionary entries, plus 4.")
def report(work: Path, dim: int, vocab_size: int) -> None:
    """Write table.md, capacity.png and updates.png."""
    rows = make_rows(collect(work), dim, vocab_size)
    table = layout(rows, count(work))
    (work / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")
    draw(rows, work / "capacity.png")
    draw_perplexity(training_logs(rows, work), work / "updates.png")


main.add_command(flags)
main.add_command(report)

if __name__ == "__main__":
    main()
