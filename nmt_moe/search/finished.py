"""The finished hypotheses of a beam search, and the record of all steps that stores them.

The rows of each step are stored when they are evaluated, each with the row of the previous step
that it continues. A finished hypothesis is stored as the number of its last row; its tokens are
traced back from that row once, at the end. When hypotheses change rows, no data that grow with
their length have to be moved.
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
        tokens: (T,) int64, the tokens; the last one is the end mark.
        score: () float32, the score that hypotheses are ranked by.
        positional_scores: (T,) float32, the log-probability of each token, in nats.
        attention: (S, T), the attention to each source position at each step; None if the model
            does not return it.
    """

    tokens: Tensor
    score: Tensor
    positional_scores: Tensor
    attention: Tensor | None


@dataclass(frozen=True)
class _Step:
    parents: Tensor  # (R,), the row of the previous step that each row continues
    tokens: Tensor  # (R,), the last token of each row
    log_probs: Tensor  # (R,), the log-probability of each row before this step
    attention: Tensor | None  # (R, S), the attention of each row at this step


@dataclass(frozen=True)
class _Ended:
    """Hypotheses that ended at the same step, sorted by sentence and then by rank.

    All fields have the shape (N,); `add` describes them.
    """

    sentences: Tensor
    steps: Tensor
    rows: Tensor
    log_probs: Tensor
    scores: Tensor


class FinishedHypotheses:
    """The finished hypotheses of B sentences, at most `beam_size` for each.

    Args:
        num_sentences: Number of sentences, B.
        beam_size: Number of hypotheses kept for each sentence, W.
        margin: Largest difference, in nats, between a hypothesis's score and the best score of its
            sentence; hypotheses with lower scores are dropped. 0 drops none.
        like: A tensor on the device of the search.

    Attributes:
        best: (B,) float32, the best score of each sentence so far; -inf if there is none yet.
        count: (B,) int64, the number of hypotheses of each sentence.
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
        """Store the R rows of a step and their attention, (R, S)."""
        self._steps.append(_Step(parents, tokens, log_probs, attention))

    def add(self, sentences: Tensor, rows: Tensor, log_probs: Tensor, scores: Tensor) -> None:
        """Add N hypotheses that end at the step recorded last.

        Args:
            sentences: (N,) int64, the sentence of each hypothesis, in ascending order.
            rows: (N,) int64, the row that each hypothesis continues with the end mark.
            log_probs: (N,) float32, the log-probability of each whole hypothesis.
            scores: (N,) float32, the scores that they are ranked by.
        """
        self.best = self.best.scatter_reduce(0, sentences, scores, "amax")
        is_kept = torch.ones_like(sentences, dtype=torch.bool)
        if self.margin:
            is_kept = within_margin(scores, self.best[sentences], self.margin)
        kept_so_far = is_kept.cumsum(0)
        first = torch.searchsorted(sentences, sentences)
        # The hypotheses kept for a sentence are numbered from 1.
        number = kept_so_far - kept_so_far[first] + is_kept[first]
        is_kept &= self.count[sentences] + number <= self.beam_size
        self.count = self.count.index_add(0, sentences, is_kept.long())
        steps = torch.full_like(rows, len(self._steps) - 1)
        fields = [field[is_kept] for field in (sentences, steps, rows, log_probs, scores)]
        self._ended.append(_Ended(*fields))

    def is_open(self) -> Tensor:
        """Return (B,) bool, True for sentences that accept more hypotheses."""
        return self.count < self.beam_size

    def collect(self, eos: int, most: int) -> list[list[Hypothesis]]:
        """Return the `most` best hypotheses of each sentence, best first.

        If scores are equal, the hypothesis that ended earlier comes first.

        Raises:
            ValueError: if a sentence has no hypothesis.
        """
        if not bool(self.count.all()):
            raise ValueError(
                f"sentence {int(self.count.argmin()) + 1} of the batch has no translation, because "
                "no token has a probability above 0. Either the model's output is NaN, or a prefix "
                "or a restriction leaves no token to choose from."
            )
        names = _Ended.__dataclass_fields__
        ended = _Ended(*(torch.cat([getattr(one, name) for one in self._ended]) for name in names))
        order = ended.scores.sort(descending=True, stable=True).indices
        is_near = ended.scores >= self.best[ended.sentences] - (self.margin or torch.inf)
        order = order[is_near[order]]
        chosen: list[list[int]] = [[] for _ in range(len(self.count))]
        for index, sentence in zip(order.tolist(), ended.sentences[order].tolist(), strict=True):
            if len(chosen[sentence]) < most:
                chosen[sentence].append(index)
        kept = order.new_tensor(list(itertools.chain(*chosen)))
        ended = _Ended(*(getattr(ended, name)[kept] for name in names))
        tokens, positional_scores, attention = self._read_back(ended, eos)
        made = (
            Hypothesis(
                tokens[index, :length],
                ended.scores[index],
                positional_scores[index, :length],
                None if attention is None else attention[index, :length].t(),
            )
            for index, length in enumerate((ended.steps + 1).tolist())
        )
        return [list(itertools.islice(made, len(own))) for own in chosen]

    def _read_back(self, ended: _Ended, eos: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Trace N hypotheses back; their values after the end mark are undefined.

        Returns:
            (N, T) tokens, (N, T) log-probabilities of the tokens, and (N, T, S) attention or None.
        """
        longest = int(ended.steps.max()) + 1
        steps = self._steps[:longest]
        rows = self._trace_rows(ended, steps)
        number = torch.arange(len(rows), device=rows.device)
        tokens = torch.cat([step.tokens for step in steps])[rows]
        tokens = torch.cat([tokens[:, 1:], tokens.new_full((len(rows), 1), eos)], dim=1)
        tokens[number, ended.steps] = eos
        log_probs = torch.cat([step.log_probs for step in steps])[rows]
        # Log-probabilities of the first 0, 1, ... tokens.
        totals = torch.cat([log_probs, log_probs[:, :1]], dim=1)
        totals[number, ended.steps + 1] = ended.log_probs
        attention = None
        if all(step.attention is not None for step in steps):
            attention = torch.cat([step.attention for step in steps])[rows]  # type: ignore[misc]
        return tokens, totals.diff(dim=1), attention

    def _trace_rows(self, ended: _Ended, steps: list[_Step]) -> Tensor:
        """Return the row of each hypothesis at each step, (N, T) int64.

        Rows are numbered consecutively over all steps. After the end of a hypothesis, its row is 0.
        Tracing runs on the host, because each index depends on the previous one.
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
