"""How good translations are: scores, by length and word frequency, best and worst sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from nmt_moe.scoring import measures
from nmt_moe.scoring.words import f_measure_by_frequency

# Resamples of the paired bootstrap.
NUM_SAMPLES = 1000
# Best and worst sentences; differences against another model.
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
        sources: Lines.
        hypotheses: Their translations.
        references: Other translations of them.
        language: Of the references, for sacrebleu's tokens; None for "13a".
        others: Translations of another model, to compare with.
        lines: Their indices in the text, by which sentences are named; None for all lines.

    Returns:
        `scores` (BLEU and chrF with their signatures), `by_length`, `by_frequency`, `best` and
        `worst` sentences by chrF; with `others` also `bootstrap`, and the sentences that are
        `better` and `worse`.
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
    own = _sentence_scores(hyps, references)
    theirs = None if others is None else _sentence_scores(others, references)
    order = sorted(range(len(own)), key=lambda n: (-own[n], n))
    count = min(NUM_EXTREMES, len(order) // 2)

    def describe(number: int) -> dict[str, Any]:
        row = {
            "line": (number if lines is None else lines[number]) + 1,
            "source": sources[number],
            "hypothesis": hyps[number],
            "reference": references[number],
            "chrf": own[number],
        }
        if others is None or theirs is None:
            return row
        return {**row, "other": others[number], "other_chrf": theirs[number]}

    content["best"] = [describe(number) for number in order[:count]]
    content["worst"] = [describe(number) for number in order[::-1][:count]]
    if others is None or theirs is None:
        return content
    gains = sorted(range(len(own)), key=lambda n: (theirs[n] - own[n], n))
    content["better"] = [describe(n) for n in gains[:NUM_EXTREMES] if own[n] > theirs[n]]
    content["worse"] = [describe(n) for n in gains[::-1][:NUM_EXTREMES] if own[n] < theirs[n]]
    content["bootstrap"] = [
        measures.compare(measure, hyps, list(others), refs, NUM_SAMPLES) for measure in metrics
    ]
    content["other_by_length"] = measures.score_by_source(
        metrics[0], list(others), refs, list(sources)
    )
    content["other_by_frequency"] = f_measure_by_frequency(others, references, tokenize)
    return content


def _sentence_scores(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    metric = CHRF()
    return [
        float(metric.sentence_score(hypothesis, [reference]).score)
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]


def language_of(name: str | None) -> str | None:
    """Return a language if a name looks like one, such as the ending of a file's."""
    return name if name is not None and re.fullmatch(r"[a-z]{2,3}([-_]\w+)?", name) else None
