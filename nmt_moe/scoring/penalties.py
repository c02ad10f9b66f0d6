"""Tune alpha and beta of GNMT's search by computing BLEU over a grid from one n-best run.

For each point, the translation with the largest log P / ((5 + length) / 6)^alpha + beta * coverage
is chosen from every n-best list. In fairseq-generate's output, the P- lines have
log-probabilities (in bits per token, with four decimals), and the A- lines have attention weights
(with six decimals). The last source position is the end mark, which is not a word.

Source: Wu et al. 2016, section 7, eq. 14 and Table 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sacrebleu.metrics import BLEU

from nmt_moe.scoring.plots import make_figure
from nmt_moe.search import SearchConfig, log_coverage, normalised_score

Grid = dict[tuple[float, float], float]


@dataclass(frozen=True)
class Hypothesis:
    """One translation as fairseq-generate printed it.

    Attributes:
        text: The detokenised text.
        log_probability: Log-probability of the translation, in nats.
        length: Number of tokens, including the end mark.
        coverage: Logarithm of the coverage, in nats, at most 0.
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
        ValueError: if a hypothesis lacks a line or has a damaged line, or there is no hypothesis.
    """
    nbest = NBest()
    columns: dict[str, str] = {}
    previous = ""
    for line in lines:
        name, _, rest = line.rstrip("\n").partition("\t")
        kind, dash, number = name.partition("-")
        if kind not in ("T", "D", "P", "A") or not dash or not number.isdigit():
            continue
        if kind == "T":
            nbest.references[int(number)] = rest
            continue
        if kind == "D" and columns:
            raise ValueError(_missing_attention(columns["D"]))
        columns[kind] = f"{number}\t{rest}" if kind == "D" else rest
        if kind == "A":
            try:
                hypothesis = parse_hypothesis(columns)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"the lines of a hypothesis of sentence {number} are damaged: {error}"
                ) from error
            if int(number) in nbest.hypotheses and number != previous:
                raise ValueError(f"sentence {number} is translated twice: are these several runs?")
            nbest.hypotheses.setdefault(int(number), []).append(hypothesis)
            columns, previous = {}, number
    if columns:
        raise ValueError(_missing_attention(columns.get("D", "?")))
    if not nbest.hypotheses:
        raise ValueError("no hypotheses (D-, P- and A- lines): is this fairseq-generate's output?")
    _check_words(nbest)
    return nbest


def _check_words(nbest: NBest) -> None:
    texts = [one.text for several in nbest.hypotheses.values() for one in several]
    if 2 * sum("▁" in text for text in texts) > len(texts):
        raise ValueError(
            "the translations (D- lines) are split into pieces, which gives a different BLEU. Run "
            "fairseq-generate with `--remove-bpe sentencepiece`."
        )


def _missing_attention(row: str) -> str:
    number = row.split("\t")[0]
    return (
        f"a hypothesis of sentence {number} has no attention (A- line). "
        "Run fairseq-generate with `--print-alignment soft`."
    )


def parse_hypothesis(columns: dict[str, str]) -> Hypothesis:
    """Combine the D-, P- and A- lines of a hypothesis."""
    if "-" in columns["A"]:
        raise ValueError("A- lines are hard alignments; run with `--print-alignment soft`")
    log_probs = [float(value) * math.log(2) for value in columns["P"].split()]
    steps = [[float(value) for value in row.split(",")] for row in columns["A"].split()]
    if len(steps) != len(log_probs):
        raise ValueError(f"{len(log_probs)} probabilities, but attention for {len(steps)} steps")
    if not all(map(math.isfinite, [*log_probs, *itertools.chain.from_iterable(steps)])):
        raise ValueError("a probability or attention is not a finite number")
    received = torch.tensor(steps).sum(dim=0, keepdim=True)[:, :-1]
    return Hypothesis(
        text=columns["D"].split("\t", 2)[2],
        log_probability=sum(log_probs),
        length=len(log_probs),
        coverage=float(log_coverage(received, torch.ones_like(received, dtype=torch.bool))),
    )


def choose(hypotheses: Sequence[Hypothesis], alpha: float, beta: float) -> Hypothesis:
    """Return the best hypothesis of a list, or the first of several that are equally good."""
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
    """Return BLEU at every point, and sacrebleu's signature.

    Raises:
        ValueError: if a sentence has no reference.
    """
    numbers = sorted(nbest.hypotheses)
    without = [number for number in numbers if number not in references]
    if without:
        raise ValueError(
            f"sentences without a reference: {len(without)}, starting with sentence {without[0]}. "
            "Name the text of the same split with `--reference`."
        )
    metric = BLEU(references=[[references[number] for number in numbers]])
    grid = {}
    for alpha in alphas:
        for beta in betas:
            chosen = [choose(nbest.hypotheses[number], alpha, beta).text for number in numbers]
            grid[alpha, beta] = metric.corpus_score(chosen, None).score
    return grid, str(metric.get_signature())


def format_grid(grid: Grid) -> str:
    """Return the grid as text, with alpha downwards and beta across; a star marks the best."""
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
    """Return the alphas and the betas of a grid."""
    return sorted({alpha for alpha, _ in grid}), sorted({beta for _, beta in grid})


def draw_grid(grid: Grid, output: Path) -> None:
    """Draw a grid as a PNG image.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    alphas, betas = axes_of(grid)
    figure = make_figure(1.6 + 0.8 * len(betas), 1.4 + 0.6 * len(alphas))
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
    """Reject values that the search rejects.

    Raises:
        ValueError: if a value is rejected; the message names the option and the value.
    """
    for alpha in alphas:
        SearchConfig(length_penalty_alpha=alpha)
    for beta in betas:
        SearchConfig(coverage_penalty_beta=beta)
