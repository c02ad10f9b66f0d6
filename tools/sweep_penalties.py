#!/usr/bin/env python3
r"""Find alpha and beta of GNMT's search: BLEU over a grid, from one n-best run.

    fairseq-generate data-bin --user-dir nmt_moe --path model.pt --gen-subset valid \
        --beam 8 --nbest 8 --print-alignment soft --remove-bpe sentencepiece > nbest.txt
    sweep_penalties.py nbest.txt
    sweep_penalties.py nbest.txt --reference valid.de --plot grid.png

Each point picks from every sentence's list the translation with the best
log P / ((5 + length) / 6)^alpha + beta * coverage. The two penalties do not steer the beam, they
only rank what has ended; so with --nbest as large as --beam, and without --beam-prune, a point is
what fairseq-generate gives with these penalties; alpha = beta = 0 is its --unnormalized. Of the
output, log-probabilities are read from the P- lines (four decimals of a bit each token), attention
from the A- lines (six decimals). The last source position is the end mark, which is no word.

BLEU is sacrebleu's, of the D- lines, against the T- lines of the same file or --reference, which
has a line for each sentence of the split: take the raw text for figures that are compared with
others. Drawing needs matplotlib: pip install 'nmt-moe[plot]'.

Source: Wu et al. 2016, section 7, eq. 14 and Table 2.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sacrebleu.metrics import BLEU

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nmt_moe.search import SearchConfig, log_coverage, normalised_score  # noqa: E402
from tools.printing import run  # noqa: E402

GRID = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
Grid = dict[tuple[float, float], float]


@dataclass(frozen=True)
class Hypothesis:
    """One translation as fairseq-generate printed it.

    Attributes:
        text: Detokenised.
        log_probability: Nats.
        length: Tokens, the end mark counted.
        coverage: Nats, at most 0.
    """

    text: str
    log_probability: float
    length: int
    coverage: float


@dataclass
class NBest:
    """The hypotheses of each sentence, and the references, by sentence number."""

    hypotheses: dict[int, list[Hypothesis]] = field(default_factory=dict)
    references: dict[int, str] = field(default_factory=dict)


def read_nbest(lines: Iterable[str]) -> NBest:
    """Read the output of fairseq-generate.

    Raises:
        ValueError: a hypothesis lacks a line or has a damaged one, or there is no hypothesis.
    """
    nbest = NBest()
    columns: dict[str, str] = {}
    for line in lines:
        name, _, rest = line.rstrip("\n").partition("\t")
        kind, dash, number = name.partition("-")
        if kind not in ("T", "D", "P", "A") or not dash or not number.isdigit():
            continue
        if kind == "T":
            nbest.references[int(number)] = rest
            continue
        if kind == "D" and columns:
            raise ValueError(missing_attention(columns["D"]))
        columns[kind] = f"{number}\t{rest}" if kind == "D" else rest
        if kind == "A":
            try:
                hypothesis = parse_hypothesis(columns)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"the lines of a hypothesis of {number} are damaged: {error}"
                ) from error
            nbest.hypotheses.setdefault(int(number), []).append(hypothesis)
            columns = {}
    if columns:
        raise ValueError(missing_attention(columns.get("D", "?")))
    if not nbest.hypotheses:
        raise ValueError("no hypothesis (D-, P- and A- lines): is this fairseq-generate's output?")
    return nbest


def missing_attention(row: str) -> str:
    number = row.split("\t")[0]
    return (
        f"a hypothesis of sentence {number} has no attention (A- line). "
        "Run fairseq-generate with `--print-alignment soft`."
    )


def parse_hypothesis(columns: dict[str, str]) -> Hypothesis:
    """Put the D-, P- and A- lines of a hypothesis together."""
    if "-" in columns["A"]:
        raise ValueError("A- lines are hard alignments; run with `--print-alignment soft`")
    log_probs = [float(value) * math.log(2) for value in columns["P"].split()]
    steps = [[float(value) for value in row.split(",")] for row in columns["A"].split()]
    if len(steps) != len(log_probs):
        raise ValueError(f"{len(log_probs)} probabilities, but attention of {len(steps)} steps")
    received = torch.tensor(steps).sum(dim=0, keepdim=True)[:, :-1]
    return Hypothesis(
        text=columns["D"].split("\t", 2)[2],
        log_probability=sum(log_probs),
        length=len(log_probs),
        coverage=float(log_coverage(received, torch.ones_like(received, dtype=torch.bool))),
    )


def choose(hypotheses: Sequence[Hypothesis], alpha: float, beta: float) -> Hypothesis:
    """Pick the best of a list; of equal ones the first."""
    scores = normalised_score(
        torch.tensor([one.log_probability for one in hypotheses]),
        torch.tensor([float(one.length) for one in hypotheses]),
        torch.tensor([one.coverage for one in hypotheses]),
        alpha,
        beta,
    )
    return hypotheses[int(scores.argmax())]


def score_grid(
    nbest: NBest, references: dict[int, str], alphas: Sequence[float], betas: Sequence[float]
) -> tuple[Grid, str]:
    """Compute BLEU at every point; return it with sacrebleu's signature.

    Raises:
        ValueError: a sentence has no reference.
    """
    numbers = sorted(nbest.hypotheses)
    without = [number for number in numbers if number not in references]
    if without:
        raise ValueError(
            f"{len(without)} sentences have no reference, sentence {without[0]} first. "
            "Give the text of the same split with `--reference`."
        )
    metric = BLEU(references=[[references[number] for number in numbers]])
    grid = {}
    for alpha in alphas:
        for beta in betas:
            chosen = [choose(nbest.hypotheses[number], alpha, beta).text for number in numbers]
            grid[alpha, beta] = metric.corpus_score(chosen, None).score
    return grid, str(metric.get_signature())


def format_grid(grid: Grid) -> str:
    """Write the grid with alpha downwards, beta across; a star marks the best."""
    alphas, betas = axes_of(grid)
    best = max(grid, key=grid.__getitem__)
    rows = [" alpha\\beta" + "".join(f"{beta:>9g}" for beta in betas)]
    for alpha in alphas:
        cells = [
            f"{grid[alpha, beta]:>8.2f}{'*' if (alpha, beta) == best else ' '}" for beta in betas
        ]
        rows.append(f"{alpha:>11g}" + "".join(cells))
    return "\n".join(rows)


def axes_of(grid: Grid) -> tuple[list[float], list[float]]:
    return sorted({alpha for alpha, _ in grid}), sorted({beta for _, beta in grid})


def draw(grid: Grid, output: Path) -> None:
    """Draw the grid as PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "drawing needs matplotlib, which is not installed: pip install 'nmt-moe[plot]'"
        ) from error
    alphas, betas = axes_of(grid)
    figure = Figure(figsize=(1.6 + 0.8 * len(betas), 1.4 + 0.6 * len(alphas)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow([[grid[alpha, beta] for beta in betas] for alpha in alphas], aspect="auto")
    for row, alpha in enumerate(alphas):
        for column, beta in enumerate(betas):
            text = f"{grid[alpha, beta]:.2f}"
            box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
            axes.text(column, row, text, ha="center", va="center", fontsize="small", bbox=box)
    axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_xlabel("beta (coverage)")
    axes.set_ylabel("alpha (length)")
    figure.colorbar(image, label="BLEU")
    figure.savefig(output, format="png", dpi=120)


def check_grid(alphas: Sequence[float], betas: Sequence[float]) -> None:
    """Refuse values that the search refuses.

    Raises:
        ValueError: naming the option and the value.
    """
    for alpha in alphas:
        SearchConfig(length_penalty_alpha=alpha)
    for beta in betas:
        SearchConfig(coverage_penalty_beta=beta)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nbest", type=Path, help="output of fairseq-generate")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="default: the T- lines")
    shown = " ".join(f"{value:g}" for value in GRID)
    for name in ("--alphas", "--betas"):
        parser.add_argument(
            name, nargs="+", type=float, default=GRID, metavar="X", help=f"default: {shown}"
        )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the grid as well")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        check_grid(args.alphas, args.betas)
        with open(args.nbest, encoding="utf-8", newline="\n") as lines:
            nbest = read_nbest(lines)
        references = nbest.references
        if args.reference:
            # Ends of lines as fairseq counts them: "\n" alone.
            with open(args.reference, encoding="utf-8", newline="\n") as lines:
                references = {number: line.rstrip("\n") for number, line in enumerate(lines)}
        grid, signature = score_grid(nbest, references, args.alphas, args.betas)
        if args.plot:
            draw(grid, args.plot)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    best = max(grid, key=grid.__getitem__)
    counts = [len(hypotheses) for hypotheses in nbest.hypotheses.values()]
    print(format_grid(grid))
    print(
        f"{len(counts)} sentences, {min(counts)} to {max(counts)} hypotheses each; "
        f"best: alpha {best[0]:g}, beta {best[1]:g}\n{signature}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
