"""Score translations: overall, by length and word frequency, with best and worst sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from nmt_moe.scoring import measures
from nmt_moe.scoring.words import f_measure_by_frequency

# Number of resamples of the paired bootstrap.
NUM_SAMPLES = 1000
# Number of sentences in each list (best, worst, most different).
NUM_EXTREMES = 8


def score_translations(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    language: str | None,
    others: Sequence[str] | None = None,
    lines: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Score translations of a text.

    Args:
        sources: Source lines.
        hypotheses: A translation of each source line.
        references: A reference translation of each source line.
        language: Language of the references, for sacrebleu's tokeniser; None for "13a".
        others: Another model's translations, for comparison.
        lines: Index of each source line in the text, shown with sentences; None if no
            line was left out.

    Returns:
        A dictionary with `scores` (BLEU and chrF with their signatures), `by_length`,
        `by_frequency`, and the `best` and `worst` sentences by chrF. With `others`, it also
        contains `bootstrap` and the `better` and `worse` sentences.
    """
    tokens = measures.validation_tokens(language or "")
    hyps, refs = list(hypotheses), [list(references)]
    metrics = [
        measures.Measure("BLEU", measures.keep, lambda: BLEU(tokenize=tokens)),
        measures.Measure("chrF", measures.keep, CHRF),
    ]
    tokenize = BLEU(tokenize=tokens).tokenizer
    content: dict[str, Any] = {
        "scores": [measures.score(measure, hyps, refs) for measure in metrics],
        "by_length": measures.score_by_source(metrics[0], hyps, refs, list(sources)),
        "by_frequency": f_measure_by_frequency(hyps, references, tokenize),
    }
    rows = _describe_lines(sources, hyps, references, others, lines)
    content |= _find_extremes(rows)
    if others is not None:
        other = list(others)
        content |= {
            "bootstrap": [
                measures.compare(measure, hyps, other, refs, NUM_SAMPLES) for measure in metrics
            ],
            "other_by_length": measures.score_by_source(metrics[0], other, refs, list(sources)),
            "other_by_frequency": f_measure_by_frequency(other, references, tokenize),
        }
    return content


def _describe_lines(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    others: Sequence[str] | None,
    lines: Sequence[int] | None,
) -> list[dict[str, Any]]:
    numbers = range(len(sources)) if lines is None else lines
    rows: list[dict[str, Any]] = [
        {"line": number + 1, "source": source, "hypothesis": text, "reference": ref, "chrf": score}
        for number, source, text, ref, score in zip(
            numbers,
            sources,
            hypotheses,
            references,
            _sentence_scores(hypotheses, references),
            strict=True,
        )
    ]
    if others is not None:
        scores = _sentence_scores(others, references)
        for row, text, score in zip(rows, others, scores, strict=True):
            row |= {"other": text, "other_chrf": score}
    return rows


def _find_extremes(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the best and worst lines, and the lines that differ most from the other model."""
    order = sorted(rows, key=lambda row: -row["chrf"])
    count = min(NUM_EXTREMES, len(order) // 2)
    found = {"best": order[:count], "worst": order[::-1][:count]}
    if rows and "other" in rows[0]:
        gains = sorted(rows, key=lambda row: row["other_chrf"] - row["chrf"])
        better = [row for row in gains if row["chrf"] > row["other_chrf"]]
        worse = [row for row in gains[::-1] if row["chrf"] < row["other_chrf"]]
        found |= {"better": better[:NUM_EXTREMES], "worse": worse[:NUM_EXTREMES]}
    return found


def _sentence_scores(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    metric = CHRF()
    return [
        float(metric.sentence_score(hypothesis, [reference]).score)
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]


def language_of(name: str | None) -> str | None:
    """Return a name, such as a file extension, if it looks like a language code; else None."""
    return name if name is not None and re.fullmatch(r"[a-z]{2,3}([-_]\w+)?", name) else None
