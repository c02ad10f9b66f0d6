"""The results that a translator returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nmt_moe.text.vocabulary import UNK

# For each piece, its experts with their gates, largest first.
Experts = list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Routing:
    """The experts of N tokens in one MoE layer.

    Attributes:
        expert_ids: (N, K) int64, the chosen experts; E in empty slots.
        gates: (N, K) float32, weights of the chosen experts; 0 in empty slots.
        inputs: (N, D) float32, the layer's inputs, if requested.
    """

    expert_ids: Tensor
    gates: Tensor
    inputs: Tensor | None = None

    def __getitem__(self, tokens: slice | Tensor) -> Routing:
        """Return the routing of selected tokens."""
        inputs = None if self.inputs is None else self.inputs[tokens]
        return Routing(self.expert_ids[tokens], self.gates[tokens], inputs)

    def to_experts(self) -> Experts:
        """Return experts and gates as plain values, without empty slots."""
        order = self.gates.argsort(dim=1, descending=True, stable=True)
        ids, gates = (part.gather(1, order).tolist() for part in (self.expert_ids, self.gates))
        return [
            [(expert, gate) for expert, gate in zip(*row, strict=True) if gate > 0]
            for row in zip(ids, gates, strict=True)
        ]


@dataclass(frozen=True)
class Hypothesis:
    """One translation of a sentence, with T pieces.

    Attributes:
        text: Text of the translation, without the end mark.
        score: The score that hypotheses are ranked by, in nats: log P divided by the length
            penalty, plus the coverage penalty if there is one.
        pieces: The T pieces of the translation.
        log_probs: T + 1 log-probabilities in nats, one for each piece and one for the end mark.
        alignment: For each of the T pieces, the index of the source piece it attends to most.
        attention: (T, S) float32, attention of each piece over all pieces of the source.
        experts: Experts of the decoder's layer for each piece, if requested.
    """

    text: str
    score: float
    pieces: list[str]
    log_probs: list[float]
    alignment: list[int]
    attention: Tensor
    experts: Experts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as plain values, without the attention."""
        content = {
            "text": self.text,
            "score": self.score,
            "pieces": self.pieces,
            "log_probs": self.log_probs,
            "alignment": self.alignment,
        }
        return content if self.experts is None else {**content, "experts": self.experts}


@dataclass(frozen=True)
class Sentence:
    """A sentence and its translations.

    Attributes:
        pieces: The S pieces of the source.
        hypotheses: The translations, best first.
        experts: Experts of the encoder's layer for each piece of the source, if requested.
    """

    pieces: list[str]
    hypotheses: list[Hypothesis]
    experts: Experts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as plain values."""
        hypotheses = [one.to_dict() for one in self.hypotheses]
        content: dict[str, Any] = {"pieces": self.pieces, "hypotheses": hypotheses}
        return content if self.experts is None else {**content, "experts": self.experts}


@dataclass(frozen=True)
class Translation:
    """The translation of a text.

    Attributes:
        text: The best translation; "" for a text without words.
        score: Sum of the scores of the text's sentences, in nats; 0 for a text without words.
        hypotheses: Texts, best first; for several sentences, the n-th text joins the n-th best
            hypotheses.
        sentences: The sentences of the text; only one unless the text is long or has several lines.
    """

    text: str
    score: float
    hypotheses: list[str]
    sentences: list[Sentence]

    @property
    def source_pieces(self) -> list[str]:
        """Return the pieces of the source, one sentence after another."""
        return [piece for one in self.sentences for piece in one.pieces]

    @property
    def pieces(self) -> list[str]:
        """Return the pieces of `text`, one sentence after another."""
        return [piece for one in self._best for piece in one.pieces]

    @property
    def alignment(self) -> list[int]:
        """Return, for each of `pieces`, the index of the source piece that it attends to most."""
        found, first = [], 0
        for sentence, best in zip(self.sentences, self._best, strict=True):
            found += [first + index for index in best.alignment]
            first += len(sentence.pieces)
        return found

    @property
    def source_experts(self) -> Experts | None:
        """Return the experts of each of `source_pieces`, if requested."""
        return _concatenate([one.experts for one in self.sentences])

    @property
    def experts(self) -> Experts | None:
        """Return the experts of each of `pieces`, if requested."""
        return _concatenate([one.experts for one in self._best])

    @property
    def _best(self) -> list[Hypothesis]:
        return [one.hypotheses[0] for one in self.sentences]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as plain values, for JSON."""
        sentences = [one.to_dict() for one in self.sentences]
        hypotheses = self.hypotheses
        return {
            "text": self.text,
            "score": self.score,
            "hypotheses": hypotheses,
            "sentences": sentences,
        }


def _concatenate(parts: list[Experts | None]) -> Experts | None:
    found = [part for part in parts if part is not None]
    return [piece for part in found for piece in part] if len(found) == len(parts) else None


@dataclass(frozen=True)
class LineScore:
    """A model's score for a line; all values include the end of the line.

    Attributes:
        log_prob: Log-probability of the line, in nats.
        pieces: Pieces of the line.
        log_probs: Log-probabilities of each piece and of the line's end, in nats.
        num_words: Number of words, separated by white space.
        num_characters: Number of characters.
        num_unknown: Number of pieces that are not in the vocabulary. They make a line seem likelier
            than it is.
        routing: Routing in the MoE layer for each piece and the end, if requested. The experts of a
            piece are the ones that predicted it, from the vector of the previous piece.
    """

    log_prob: float
    pieces: list[str]
    log_probs: list[float]
    num_words: int
    num_characters: int
    num_unknown: int
    routing: Routing | None = None

    @property
    def perplexity_per_piece(self) -> float:
        """Return the perplexity per piece, including the end."""
        return _perplexity(self.log_prob, len(self.log_probs))

    @property
    def perplexity_per_word(self) -> float:
        """Return the perplexity per word, including the end."""
        return _perplexity(self.log_prob, self.num_words + 1)

    @property
    def perplexity_per_character(self) -> float:
        """Return the perplexity per character, including the end."""
        return _perplexity(self.log_prob, self.num_characters + 1)

    @property
    def bits_per_character(self) -> float:
        """Return the loss in bits per character, including the end."""
        return -self.log_prob / math.log(2) / (self.num_characters + 1)


def _perplexity(log_prob: float, count: int) -> float:
    try:
        return math.exp(-log_prob / count)
    except OverflowError:
        return math.inf


def score_line(
    line: str, pieces: list[str], numbers: list[int], log_probs: list[float]
) -> LineScore:
    """Build the score of a line from its pieces' ids and log-probabilities."""
    return LineScore(
        math.fsum(log_probs), pieces, log_probs, len(line.split()), len(line), numbers.count(UNK)
    )


def total_score(scores: Sequence[LineScore]) -> LineScore:
    """Compute the score of a whole text from the scores of its lines.

    The result's perplexities refer to the whole text, including the end of each line.

    Raises:
        ValueError: if there are no lines.
    """
    if not scores:
        raise ValueError("`scores` must have at least one line, but is empty.")
    ends = len(scores) - 1
    return LineScore(
        sum(one.log_prob for one in scores),
        [piece for one in scores for piece in one.pieces],
        [value for one in scores for value in one.log_probs],
        sum(one.num_words for one in scores) + ends,
        sum(one.num_characters for one in scores) + ends,
        sum(one.num_unknown for one in scores),
    )


@dataclass(frozen=True)
class PairScore:
    """A translator's score for a reference translation of a text.

    Attributes:
        source_tokens: The S tokens that the encoder reads: the pieces, a multilingual model's
            language token, and the end mark.
        target: Score of the reference, which has T pieces.
        attention: (T + 1, S) float32, for each piece of the reference and its end mark.
        routing: Routing in the encoder's layer for each of `source_tokens`, if requested.
    """

    source_tokens: list[str]
    target: LineScore
    attention: Tensor
    routing: Routing | None = None
