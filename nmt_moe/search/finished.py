"""The finished hypotheses of a beam search, and the record from which they are read.

The rows of each step are stored as they are evaluated, each with the row of the previous step that
it continues. A finished hypothesis is stored as its last row; its tokens are traced back from there
once, at the end. Thus nothing that grows with the length is moved when hypotheses change rows.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.search.pruning import within_margin


@dataclass(frozen=True)
class Hypothesis:
    """A finished hypothesis of T tokens, including the end mark.

    Attributes:
        tokens: (T,) int64, ending with the end mark.
        score: () float32, the score by which hypotheses are ranked.
        positional_scores: (T,) float32, log-probability of each token, in nats.
        attention: (S, T), attention to each source position at each step, if the model returns it.
    """

    tokens: Tensor
    score: Tensor
    positional_scores: Tensor
    attention: Tensor | None


@dataclass(frozen=True)
class _Step:
    parents: Tensor  # (R,) rows of the previous step
    tokens: Tensor  # (R,) the last token of each row
    log_probs: Tensor  # (R,) for each row before this step
    attention: Tensor | None  # (R, S)


@dataclass(frozen=True)
class _Ended:
    """Hypotheses that ended at one step: all (N,), sorted by sentence, then by rank."""

    sentences: Tensor
    steps: Tensor
    rows: Tensor
    log_probs: Tensor
    scores: Tensor


class FinishedHypotheses:
    """Collect hypotheses of B sentences, at most `beam_size` for each.

    Args:
        num_sentences: Number of sentences, B.
        beam_size: Hypotheses kept for each sentence, W.
        margin: Hypotheses that score more than this below the best of their sentence are dropped,
            in nats; 0 drops none.
        like: A tensor on the device of the search.

    Attributes:
        best: (B,) float32, the best score of each sentence so far; -inf = none yet.
        count: (B,) int64, number of hypotheses of each sentence.
    """

    def __init__(self, num_sentences: int, beam_size: int, margin: float, like: Tensor) -> None:
        self.beam_size = beam_size
        self.margin = margin
        self.best = torch.full((num_sentences,), -torch.inf, device=like.device)
        self.count = torch.zeros(num_sentences, dtype=torch.int64, device=like.device)
        self._steps: list[_Step] = []
        self._ended: list[_Ended] = []

    def record_step(
        self, parents: Tensor, tokens: Tensor, log_probs: Tensor, attention: Tensor | None
    ) -> None:
        """Store the (R,) rows of a step and their (R, S) attention."""
        self._steps.append(_Step(parents, tokens, log_probs, attention))

    def add(self, sentences: Tensor, rows: Tensor, log_probs: Tensor, scores: Tensor) -> None:
        """Add hypotheses that end at the step recorded last: all (N,), `sentences` ascending.

        Args:
            sentences: int64, the sentence of each hypothesis.
            rows: int64, the row of each hypothesis before its end mark.
            log_probs: Log-probabilities of the whole hypotheses.
            scores: Scores by which to rank them.
        """
        self.best = self.best.scatter_reduce(0, sentences, scores, "amax")
        is_kept = torch.ones_like(sentences, dtype=torch.bool)
        if self.margin:
            is_kept = within_margin(scores, self.best[sentences], self.margin)
        kept_so_far = is_kept.cumsum(0)
        first = torch.searchsorted(sentences, sentences)
        number = (
            kept_so_far - kept_so_far[first] + is_kept[first]
        )  # number within its sentence, from 1
        is_kept &= self.count[sentences] + number <= self.beam_size
        self.count = self.count.index_add(0, sentences, is_kept.long())
        steps = torch.full_like(rows, len(self._steps) - 1)
        fields = [field[is_kept] for field in (sentences, steps, rows, log_probs, scores)]
        self._ended.append(_Ended(*fields))

    def is_open(self) -> Tensor:
        """Return (B,) bool: which sentences accept more hypotheses."""
        return self.count < self.beam_size

    def collect(self, eos: int) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence, best first; with equal scores, the earlier first.

        Raises:
            ValueError: if a sentence has none.
        """
        if not bool(self.count.all()):
            raise ValueError(
                f"sentence {int(self.count.argmin()) + 1} of the batch has no translation: no "
                "token has a probability above 0. Either the model's output is not a number, or a "
                "prefix or a restriction leaves no token."
            )
        names = _Ended.__dataclass_fields__
        ended = _Ended(*(torch.cat([getattr(one, name) for one in self._ended]) for name in names))
        tokens, positional_scores, attention = self._read_back(ended, eos)
        found: list[list[Hypothesis]] = [[] for _ in range(len(self.count))]
        order = ended.scores.sort(descending=True, stable=True).indices
        is_near = ended.scores >= self.best[ended.sentences] - (self.margin or torch.inf)
        order = order[is_near[order]]
        ends = ended.steps[order] + 1
        for index, sentence, length in zip(
            order.tolist(), ended.sentences[order].tolist(), ends.tolist(), strict=True
        ):
            found[sentence].append(
                Hypothesis(
                    tokens[index, :length],
                    ended.scores[index],
                    positional_scores[index, :length],
                    None if attention is None else attention[index, :length].t(),
                )
            )
        return found

    def _read_back(self, ended: _Ended, eos: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (N, T) tokens and log-probabilities, and (N, T, S) attention, up to each end."""
        longest = int(ended.steps.max()) + 1
        steps = self._steps[:longest]
        rows = self._trace_rows(ended, steps)  # (N, T), in the rows of all steps
        number = torch.arange(len(rows), device=rows.device)
        tokens = torch.cat([step.tokens for step in steps])[rows]
        tokens = torch.cat([tokens[:, 1:], tokens.new_full((len(rows), 1), eos)], dim=1)
        tokens[number, ended.steps] = eos
        log_probs = torch.cat([step.log_probs for step in steps])[rows]
        totals = torch.cat(
            [log_probs, log_probs[:, :1]], dim=1
        )  # totals after each number of tokens
        totals[number, ended.steps + 1] = ended.log_probs
        attention = None
        if all(step.attention is not None for step in steps):
            attention = torch.cat([step.attention for step in steps])[rows]  # type: ignore[misc]
        return tokens, totals.diff(dim=1), attention

    def _trace_rows(self, ended: _Ended, steps: list[_Step]) -> Tensor:
        """Return (N, T) int64, the row of each hypothesis at each step, counted over all steps.

        This runs on the host, because it follows one index after another. After its end, a
        hypothesis has row 0.
        """
        parents = [step.parents.tolist() for step in steps]
        first = [0, *itertools.accumulate(map(len, parents))]
        traced = []
        for last, row in zip(ended.steps.tolist(), ended.rows.tolist(), strict=True):
            own = [0] * len(steps)
            for index in range(last, -1, -1):
                own[index] = first[index] + row
                row = parents[index][row]
            traced.append(own)
        return torch.tensor(traced, device=ended.rows.device)
