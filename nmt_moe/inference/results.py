"""What a translator returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nmt_moe.text.vocabulary import UNK

# Of each piece, the experts it was sent to with their gates, largest first.
Experts = list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Routing:
    """The experts of N tokens in one MoE layer.

    Attributes:
        expert_ids: (N, K) int64; E in empty slots.
        gates: (N, K) float32; 0 in empty slots.
        inputs: (N, D) float32, what the layer read, if it was asked for.
    """

    expert_ids: Tensor
    gates: Tensor
    inputs: Tensor | None = None

    def __getitem__(self, tokens: slice | Tensor) -> Routing:
        """Return the routing of some of the tokens."""
        inputs = None if self.inputs is None else self.inputs[tokens]
        return Routing(self.expert_ids[tokens], self.gates[tokens], inputs)

    def to_experts(self) -> Experts:
        """Return plain values, without empty slots."""
        order = self.gates.argsort(dim=1, descending=True, stable=True)
        ids, gates = (part.gather(1, order).tolist() for part in (self.expert_ids, self.gates))
        return [
            [(expert, gate) for expert, gate in zip(*row, strict=True) if gate > 0]
            for row in zip(ids, gates, strict=True)
        ]


@dataclass(frozen=True)
class Hypothesis:
    """One translation of one sentence, of T pieces.

    Attributes:
        text: Without the end mark.
        score: What hypotheses are ranked by, nats: log P divided by the length penalty, with the
            coverage penalty if there is one.
        pieces: T.
        log_probs: T + 1, log P of each piece and of the end mark, nats.
        alignment: T, for each piece the index of the source piece that it attends to most.
        attention: (T, S) float32, over all pieces of the source.
        experts: Of the decoder's layer for each piece, if they were asked for.
    """

    text: str
    score: float
    pieces: list[str]
    log_probs: list[float]
    alignment: list[int]
    attention: Tensor
    experts: Experts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the attention."""
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
        pieces: S, of the source.
        hypotheses: Best first.
        experts: Of the encoder's layer for each piece of the source, if they were asked for.
    """

    pieces: list[str]
    hypotheses: list[Hypothesis]
    experts: Experts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        hypotheses = [one.to_dict() for one in self.hypotheses]
        content: dict[str, Any] = {"pieces": self.pieces, "hypotheses": hypotheses}
        return content if self.experts is None else {**content, "experts": self.experts}


@dataclass(frozen=True)
class Translation:
    """The translation of a text.

    Attributes:
        text: The best; "" of a text without words.
        score: The sum of its sentences' scores, nats; 0 without words.
        hypotheses: Texts, best first: of a text of several sentences, the n-th joins the n-th best
            of each.
        sentences: What the text was cut into: one sentence unless it is long or has several lines.
    """

    text: str
    score: float
    hypotheses: list[str]
    sentences: list[Sentence]

    @property
    def source_pieces(self) -> list[str]:
        """The pieces of the source, one sentence after the other."""
        return [piece for one in self.sentences for piece in one.pieces]

    @property
    def pieces(self) -> list[str]:
        """The pieces of `text`, one sentence after the other."""
        return [piece for one in self._best for piece in one.pieces]

    @property
    def alignment(self) -> list[int]:
        """For each of `pieces`, the index in `source_pieces` of what it attends to most."""
        found, first = [], 0
        for sentence, best in zip(self.sentences, self._best, strict=True):
            found += [first + index for index in best.alignment]
            first += len(sentence.pieces)
        return found

    @property
    def source_experts(self) -> Experts | None:
        """The experts of each of `source_pieces`, if they were asked for."""
        return _concatenate([one.experts for one in self.sentences])

    @property
    def experts(self) -> Experts | None:
        """The experts of each of `pieces`, if they were asked for."""
        return _concatenate([one.experts for one in self._best])

    @property
    def _best(self) -> list[Hypothesis]:
        return [one.hypotheses[0] for one in self.sentences]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
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
    """How likely a model finds a line; the end of the line is counted everywhere.

    Attributes:
        log_prob: Of the line, nats.
        pieces: Its pieces.
        log_probs: Of each piece and of the end, nats.
        num_words: Runs of characters between white space.
        num_characters: Of the line.
        num_unknown: Pieces that are not in the vocabulary; they make a line seem likelier.
        routing: Of the MoE layer for each piece and the end, if it was asked for. The experts of a
            piece are those that wrote it: its predecessor's vector went through them.
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
        """Perplexity over pieces and the end."""
        return _perplexity(self.log_prob, len(self.log_probs))

    @property
    def perplexity_per_word(self) -> float:
        """Perplexity over words and the end."""
        return _perplexity(self.log_prob, self.num_words + 1)

    @property
    def perplexity_per_character(self) -> float:
        """Perplexity over characters and the end."""
        return _perplexity(self.log_prob, self.num_characters + 1)

    @property
    def bits_per_character(self) -> float:
        """Loss in bits over characters and the end."""
        return -self.log_prob / math.log(2) / (self.num_characters + 1)


def _perplexity(log_prob: float, count: int) -> float:
    try:
        return math.exp(-log_prob / count)
    except OverflowError:
        return math.inf


def score_line(
    line: str, pieces: list[str], numbers: list[int], log_probs: list[float]
) -> LineScore:
    """Put the score of a line together, from its pieces' numbers and log-probabilities."""
    return LineScore(
        math.fsum(log_probs), pieces, log_probs, len(line.split()), len(line), numbers.count(UNK)
    )


def total_score(scores: Sequence[LineScore]) -> LineScore:
    """Return the score of a text of several lines, without the pieces' own.

    Its perplexities are those of the text: each line's end is counted.

    Raises:
        ValueError: there is no line.
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
    """How likely a translator finds a reference of a text.

    Attributes:
        source_tokens: S, the pieces that the encoder reads, with the language mark of a
            multilingual model and the end mark.
        target: Of the reference, T pieces.
        attention: (T + 1, S) float32, for each piece of the reference and its end mark.
        routing: Of the encoder's layer for each of `source_tokens`, if it was asked for.
    """

    source_tokens: list[str]
    target: LineScore
    attention: Tensor
    routing: Routing | None = None
