"""What a translator returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Of each piece, the experts it was sent to with their gates, largest first.
Experts = list[list[tuple[int, float]]]


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
