"""Turn the hypotheses of a search into the results that a translator returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nmt_moe.inference.forcing import force_decode
from nmt_moe.inference.networks import TranslationNetwork
from nmt_moe.inference.results import Experts, Hypothesis, Routing, Sentence, Translation
from nmt_moe.inference.searching import Ensemble
from nmt_moe.inference.text import TargetText
from nmt_moe.search import Hypothesis as Found


def describe(
    cut: Sequence[list[str]],
    found: Sequence[list[Found]],
    num_marks: int,
    symbols: Sequence[str],
    target: TargetText,
) -> list[Sentence]:
    """Turn hypotheses into sentences with their translations.

    Args:
        cut: Pieces of each source.
        found: Hypotheses for each source, best first.
        num_marks: Number of language tokens before each source, which are left out of results.
        symbols: Symbols of the target's vocabulary.
        target: Object that joins pieces into text.
    """
    sentences = []
    for pieces, of_sentence in zip(cut, found, strict=True):
        part = slice(num_marks, num_marks + len(pieces))
        hypotheses = []
        for one in of_sentence:
            words = [symbols[token] for token in one.tokens[:-1].tolist()]
            assert one.attention is not None
            attention = one.attention[part, : len(words)].t().contiguous()
            hypotheses.append(
                Hypothesis(
                    target.join(words),
                    float(one.score),
                    words,
                    one.positional_scores.tolist(),
                    attention.argmax(dim=1).tolist() if words else [],
                    attention,
                )
            )
        sentences.append(Sentence(pieces, hypotheses))
    return sentences


def add_experts(
    network: TranslationNetwork,
    sentences: Sequence[Sentence],
    sources: Sequence[list[int]],
    found: Sequence[list[Found]],
    num_marks: int,
) -> list[Sentence]:
    """Add the experts that one network sends each piece to.

    Args:
        network: The network, which reads sources and hypotheses again.
        sentences: Results without experts, from `describe`.
        sources: Tokens of each source, with its language token and end mark.
        found: Hypotheses for each source, best first.
        num_marks: Number of language tokens before each source, which are left out of results.
    """
    repeated = [s for s, own in zip(sources, found, strict=True) for _ in own]
    targets = [one.tokens[:-1].tolist() for own in found for one in own]
    forced = iter(force_decode(Ensemble([network]), repeated, targets))
    results = []
    for sentence in sentences:
        own = [next(forced) for _ in sentence.hypotheses]
        hypotheses = [
            replace(one, experts=_experts(read.target, len(one.pieces)))
            for one, read in zip(sentence.hypotheses, own, strict=True)
        ]
        experts = _experts(own[0].source, num_marks + len(sentence.pieces))[num_marks:]
        results.append(replace(sentence, hypotheses=hypotheses, experts=experts))
    return results


def _experts(routing: Routing | None, num_tokens: int) -> Experts:
    """Return the experts of the first `num_tokens` tokens, or empty lists for a dense network."""
    return [[] for _ in range(num_tokens)] if routing is None else routing[:num_tokens].to_experts()


def join_sentences(
    by_line: Sequence[list[Sentence]], separator: str, num_hypotheses: int
) -> Translation:
    """Join the sentences of each line, and the lines of a text."""
    sentences = [sentence for of_line in by_line for sentence in of_line]
    shortest = min([len(one.hypotheses) for one in sentences], default=1)
    texts = [
        "\n".join(
            separator.join(
                sentence.hypotheses[rank].text for sentence in of_line if sentence.hypotheses
            )
            for of_line in by_line
        )
        for rank in range(min(shortest, num_hypotheses))
    ]
    score = sum(sentence.hypotheses[0].score for sentence in sentences)
    return Translation(texts[0], score, texts, sentences)
