"""Show sentences of a text piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nmt_moe.inference import LanguageModel, Sentence, Translator

# Maximum number of sentences shown piece by piece in total, and minimum number for each part.
NUM_SENTENCES, MIN_SENTENCES = 24, 4
NUM_HYPOTHESES = 5
# Sentences shown piece by piece are cut to this many pieces on each side.
MAX_SHOWN_PIECES = 128


@dataclass(frozen=True)
class Part:
    """A text with its name, languages and references.

    Attributes:
        name: Name of the part, such as its language.
        text: Lines.
        references: A translation of each line, or None.
        target_lang: Target language of a multilingual model.
        language: Language of the references, if known.
    """

    name: str
    text: Sequence[str]
    references: Sequence[str] | None = None
    target_lang: str | None = None
    language: str | None = None


def show_sentences(
    model: Translator | LanguageModel, part: Part, most: int
) -> Iterator[dict[str, Any]]:
    """Yield the first sentences of a part, with attention and routing of each piece."""
    given = part.text if part.references is None else part.references
    kept = [n for n, text in enumerate(part.text) if text.strip() and given[n].strip()]
    lines = kept[:most]
    texts = [part.text[n] for n in lines]
    if isinstance(model, LanguageModel):
        for line, score in zip(lines, model.score(texts, with_experts=True), strict=True):
            experts = None if score.routing is None else score.routing.to_experts()
            yield {
                "part": part.name,
                "line": line + 1,
                "pieces": score.pieces[:MAX_SHOWN_PIECES],
                "log_probs": _rounded(score.log_probs[:MAX_SHOWN_PIECES]),
                "experts": _experts(experts),
                "is_cut": len(score.pieces) > MAX_SHOWN_PIECES,
            }
        return
    count = min(NUM_HYPOTHESES, model.defaults.beam_size)
    results = model.translate(texts, part.target_lang, num_hypotheses=count, with_experts=True)
    for line, result in zip(lines, results, strict=True):
        reference = None if part.references is None else part.references[line]
        for sentence in result.sentences[:most]:
            most -= 1
            yield _show_sentence(part.name, line, sentence, reference)


def _show_sentence(
    part: str, line: int, sentence: Sentence, reference: str | None
) -> dict[str, Any]:
    best = sentence.hypotheses[0]
    lengths = len(sentence.pieces), len(best.pieces)
    attention = best.attention[:MAX_SHOWN_PIECES, :MAX_SHOWN_PIECES]
    return {
        "part": part,
        "line": line + 1,
        "source_pieces": sentence.pieces[:MAX_SHOWN_PIECES],
        "source_experts": _experts(sentence.experts),
        "pieces": best.pieces[:MAX_SHOWN_PIECES],
        "log_probs": _rounded(best.log_probs[:MAX_SHOWN_PIECES]),
        "experts": _experts(best.experts),
        "attention": [_rounded(row) for row in attention.tolist()],
        "hypotheses": [
            {"text": one.text, "score": one.score, "log_prob": sum(one.log_probs)}
            for one in sentence.hypotheses
        ],
        "reference": reference,
        "is_cut": max(lengths) > MAX_SHOWN_PIECES,
    }


def _experts(experts: list[list[tuple[int, float]]] | None) -> list[list[list[float]]] | None:
    if experts is None or not any(experts):
        return None
    shown = experts[:MAX_SHOWN_PIECES]
    return [[[expert, round(gate, 3)] for expert, gate in row] for row in shown]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]
