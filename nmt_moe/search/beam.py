"""Beam search, in one loop over the live hypotheses.

The model is a function: for R rows, `step(tokens, state)` returns the log-probabilities of the next
token, the attention weights used to predict it, and the new state. In this package, a row is a live
hypothesis. The rows of a sentence are consecutive, with the best first. At the first step, each
sentence has one row. Rows of finished sentences and of pruned hypotheses are never evaluated.

With all options of `SearchConfig` off, the search works like fairseq's. Among the W best candidates
of a step, the candidates that end are finished, and the W best of the others continue. A sentence
is finished when it has W finished hypotheses or reaches its maximum length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from nmt_moe.search.candidates import Candidates, Ended, Rows, find_candidates, next_rows
from nmt_moe.search.config import SearchConfig
from nmt_moe.search.finished import FinishedHypotheses, Hypothesis
from nmt_moe.search.pruning import best_attainable, within_margin
from nmt_moe.search.restrictions import Restrictions
from nmt_moe.search.scores import length_penalty, log_coverage


class StepState(Protocol):
    """The state that a model keeps for each row between two steps."""

    def reorder(self, rows: Tensor) -> Self:
        """Return the state of new rows; `rows`, (R',) int64, contains the old row of each."""


StateT = TypeVar("StateT", bound=StepState)
# Maps the tokens so far, (R, T) int64 with the start token, and the state to three values: the
# log-probabilities, (R, V), which the search may overwrite; the attention over the source, (R, S),
# or None; and the new state.
Step = Callable[[Tensor, StateT], tuple[Tensor, Tensor | None, StateT]]


@dataclass(frozen=True)
class BeamConfig:
    """Options of a beam search.

    Attributes:
        beam_size: Number of hypotheses kept for each sentence, W. A sentence is finished when it
            has this many finished hypotheses.
        length_exponent: Without penalties in `search`, the score of a hypothesis is
            log P / length^length_exponent, as with fairseq's `--lenpen`. The length includes the
            end mark. 0 means that the score is log P.
        search: GNMT's penalties, which replace this score, and its pruning.
        num_hypotheses: Number of hypotheses to return for each sentence; None for all.

    Raises:
        ValueError: if `beam_size` or `num_hypotheses` is below 1.
    """

    beam_size: int = 5
    length_exponent: float = 1.0
    search: SearchConfig = field(default_factory=SearchConfig)
    num_hypotheses: int | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("beam_size", self.beam_size),
            ("num_hypotheses", self.num_hypotheses),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")

    def penalty(self, length: Any) -> Any:
        """Return the divisor of the log-probability of a hypothesis with `length` tokens."""
        if self.search.changes_scores:
            return length_penalty(length, self.search.length_penalty_alpha)
        return length**self.length_exponent


@torch.no_grad()
def beam_search(
    step: Step,
    state: StateT,
    start: Tensor,
    config: BeamConfig,
    restrictions: Restrictions,
    source_words: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Search for the best continuations of `start`.

    Args:
        step: Function that runs the model on one more token of each row.
        state: State of the model, with one row for each sentence.
        start: (B,) int64, the start token of each sentence.
        config: Beam size, scores and pruning.
        restrictions: Restrictions on the tokens that may follow.
        source_words: (B, S) bool, True for a word that counts in the coverage penalty. Needed only
            with a coverage penalty.

    Returns:
        The hypotheses of each sentence, at most W or `num_hypotheses`, with the best first. If
        scores are equal, the hypothesis that ended first comes first. If candidates of the same
        step are equal, the one from the better row comes first, and within a row, the one with the
        smaller token.

    Raises:
        ValueError: if a sentence has no hypothesis, or the attention does not match `source_words`.

    Source: Wu et al. 2016, section 7, for scores and pruning.
    """
    width, margin, eos = config.beam_size, config.search.beam_prune, restrictions.eos
    sentence = torch.arange(len(start), device=start.device)
    log_probs = torch.zeros(len(start), device=start.device)
    rows = Rows(sentence, torch.zeros_like(sentence), start.unsqueeze(1), log_probs)
    finished = FinishedHypotheses(len(start), width, margin, start)
    parents = sentence
    while parents.numel():  # `len` of a tensor takes many microseconds
        next_log_probs, attention, state = step(rows.tokens, state)
        finished.record_step(parents, rows.tokens[:, -1], rows.log_probs, attention)
        if config.search.coverage_penalty_beta:
            rows = _add_attention(rows, attention)
        restricted = restrictions.apply(next_log_probs.float(), rows.tokens, rows.sentence)
        candidates, ended = find_candidates(restricted, rows, len(start), width, margin, eos)
        if ended.sentence.numel():
            _finish(candidates, ended, rows, finished, config, source_words)
        length = rows.tokens.shape[1]
        is_kept = _within_reach(candidates, length, finished, config, restrictions.max_lengths)
        chosen = next_rows(candidates, finished.is_open(), is_kept, width, eos)
        rows, parents = _continue(rows, *chosen)
        if parents.numel():
            state = state.reorder(parents)
    return finished.collect(eos, config.num_hypotheses or width)


def _add_attention(rows: Rows, attention: Tensor | None) -> Rows:
    if attention is None:
        return rows
    received = attention.float()
    return replace(rows, received=received if rows.received is None else rows.received + received)


def _finish(
    candidates: Candidates,
    ended: Ended,
    rows: Rows,
    finished: FinishedHypotheses,
    config: BeamConfig,
    source_words: Tensor | None,
) -> None:
    """Score the hypotheses that end at this step."""
    index = ended.sentence, ended.rank
    ending, log_probs = candidates.rows[index], candidates.log_probs[index]
    scores = log_probs / config.penalty(rows.tokens.shape[1])
    beta = config.search.coverage_penalty_beta
    if beta:
        assert source_words is not None
        received = None if rows.received is None else rows.received[ending]
        scores = scores + beta * log_coverage(received, source_words[ended.sentence])
    finished.add(ended.sentence, ending, log_probs, scores)


def _within_reach(
    candidates: Candidates,
    length: int,
    finished: FinishedHypotheses,
    config: BeamConfig,
    max_lengths: Tensor,
) -> Tensor | None:
    """Return which candidates can lead to a good enough hypothesis, (B, C) bool, or None for all.

    `length` is the number of tokens of a candidate, without the start token.
    """
    margin = config.search.beam_prune
    if not margin:
        return None
    shortest, longest = config.penalty(length + 1), config.penalty(max_lengths + 1)
    bound = best_attainable(candidates.log_probs, shortest, longest.unsqueeze(1))
    return within_margin(bound, finished.best.unsqueeze(1), margin)


def _continue(
    rows: Rows,
    sentence: Tensor,
    rank: Tensor,
    parents: Tensor,
    tokens: Tensor,
    log_probs: Tensor,
) -> tuple[Rows, Tensor]:
    """Return the next step's rows, given the results of `next_rows`, and their parents."""
    so_far = torch.cat([rows.tokens[parents], tokens.unsqueeze(1)], dim=1)
    received = None if rows.received is None else rows.received[parents]
    return Rows(sentence, rank, so_far, log_probs, received), parents
