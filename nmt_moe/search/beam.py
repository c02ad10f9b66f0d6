"""Beam search, in one loop over the live hypotheses.

The model is a function: for R rows, `step(tokens, state)` returns the log-probabilities of the next
token, the attention weights used to predict it, and the new state. In this package, a row is a live
hypothesis. The rows of a sentence are consecutive, with the best first. At the first step, each
sentence has one row. Rows of finished sentences and of pruned hypotheses are never evaluated.

With all options of `SearchConfig` off, the search works like fairseq's. Among the W best candidates
of a step, the candidates that end are finished, and the W best of the others continue. A sentence
is finished when it has W finished hypotheses or reaches its maximal length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from nmt_moe.search.config import SearchConfig
from nmt_moe.search.finished import FinishedHypotheses, Hypothesis
from nmt_moe.search.pruning import best_attainable, mask_tokens, within_margin
from nmt_moe.search.restrictions import Restrictions
from nmt_moe.search.scores import length_penalty, log_coverage


class StepState(Protocol):
    """The state that a model keeps for each row between two steps."""

    def reorder(self, rows: Tensor) -> Self:
        """Return the state of new rows; `rows`, (R',) int64, contains the old row of each."""


# Number of tokens that share a maximum in the search for the best tokens, and the number of
# log-probabilities from which these maxima save time.
BLOCK = 8
BLOCKS_FROM = 1 << 17

StateT = TypeVar("StateT", bound=StepState)
# Maps (R, T) int64 tokens so far, including the start token, and the state to (R, V)
# log-probabilities, which the search may overwrite, (R, S) attention over the source or None, and
# the new state.
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

    Raises:
        ValueError: if `beam_size` is below 1.
    """

    beam_size: int = 5
    length_exponent: float = 1.0
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        if self.beam_size < 1:
            raise ValueError(f"`beam_size` must be at least 1, but is {self.beam_size}.")

    def penalty(self, length: Any) -> Any:
        """Return the divisor of the log-probability of a hypothesis with `length` tokens."""
        if self.search.changes_scores:
            return length_penalty(length, self.search.length_penalty_alpha)
        return length**self.length_exponent


@dataclass(frozen=True)
class _Rows:
    """The R hypotheses that a step evaluates.

    Attributes:
        sentence: (R,) int64, the sentence of each row, in ascending order.
        rank: (R,) int64, the rank of each row in its sentence; 0 for the best.
        tokens: (R, T) int64, the tokens so far, including the start token.
        log_probs: (R,) float32, the log-probability of these tokens.
        received: (R, S) float32, attention summed over all steps; None if no score needs it.
    """

    sentence: Tensor
    rank: Tensor
    tokens: Tensor
    log_probs: Tensor
    received: Tensor | None = None


@dataclass(frozen=True)
class _Candidates:
    """The best continuations of each sentence, at most C = 2W, best first.

    Attributes:
        log_probs: (B, C) float32, the log-probability of the whole hypothesis; -inf for no
            candidate.
        tokens: (B, C) int64, the last token of each candidate.
        rows: (B, C) int64, the row that each candidate continues.
    """

    log_probs: Tensor
    tokens: Tensor
    rows: Tensor


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
        The hypotheses of each sentence, at most W, with the best first. If scores are equal, the
        hypothesis that ended first comes first. If candidates of the same step are equal, the one
        from the better row comes first, and then the one with the smaller token.

    Raises:
        ValueError: if a sentence has no hypothesis, or the attention does not match `source_words`.

    Source: Wu et al. 2016, section 7, for scores and pruning.
    """
    sentence = torch.arange(len(start), device=start.device)
    log_probs = torch.zeros(len(start), device=start.device)
    rows = _Rows(sentence, torch.zeros_like(sentence), start.unsqueeze(1), log_probs)
    finished = FinishedHypotheses(len(start), config.beam_size, config.search.beam_prune, start)
    parents = sentence
    while parents.numel():  # `len` of a tensor takes many microseconds
        next_log_probs, attention, state = step(rows.tokens, state)
        finished.record_step(parents, rows.tokens[:, -1], rows.log_probs, attention)
        if config.search.coverage_penalty_beta:
            rows = _add_attention(rows, attention)
        restricted = restrictions.apply(next_log_probs.float(), rows.tokens, rows.sentence)
        candidates = _find_candidates(restricted, rows, start.numel(), config)
        _finish(candidates, rows, finished, config, restrictions.eos, source_words)
        goes_on = _goes_on(candidates, rows, finished, config, restrictions)
        rows, parents = _continue(candidates, rows, goes_on)
        if parents.numel():
            state = state.reorder(parents)
    return finished.collect(restrictions.eos)


def _add_attention(rows: _Rows, attention: Tensor | None) -> _Rows:
    if attention is None:
        return rows
    received = attention.float()
    return replace(rows, received=received if rows.received is None else rows.received + received)


def _find_candidates(
    next_log_probs: Tensor, rows: _Rows, num_sentences: int, config: BeamConfig
) -> _Candidates:
    width = config.beam_size
    # Each row can contribute at most W candidates that continue and one that ends.
    values, tokens = _best_tokens(next_log_probs, width + 1)
    shape = num_sentences, width, values.shape[1]
    num_rows = values.shape[0]
    numbers = torch.arange(num_rows, device=values.device)
    if num_rows == num_sentences * width:  # no slot is empty
        local, all_tokens, all_rows = values.reshape(shape), tokens, numbers
        so_far = rows.log_probs
    else:
        slots = rows.sentence, rows.rank
        local = values.new_full(shape, -torch.inf).index_put_(slots, values)
        so_far = values.new_zeros(shape[:2]).index_put_(slots, rows.log_probs)
        all_tokens = tokens.new_zeros(shape).index_put_(slots, tokens)
        all_rows = tokens.new_zeros(shape[:2]).index_put_(slots, numbers)
    if config.search.beam_prune:
        local = mask_tokens(local, local[:, :, 0].isfinite(), config.search.beam_prune)
    totals = (so_far.view(shape[0], width, 1) + local).flatten(1)
    log_probs, order = totals.sort(dim=1, descending=True, stable=True)
    order = order[:, : 2 * width]
    parents = torch.div(order, shape[2], rounding_mode="floor")
    return _Candidates(
        log_probs[:, : 2 * width],
        all_tokens.reshape(num_sentences, -1).gather(1, order),
        all_rows.view(shape[:2]).gather(1, parents),
    )


def _best_tokens(log_probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best log-probabilities and tokens, (R, count) each; smaller tokens win ties."""
    count = min(count, log_probs.shape[1])
    # Find one more token, to see whether the last one is tied.
    values, tokens = _largest(log_probs, min(count + 1, log_probs.shape[1]))
    is_tied = values[:, 1:] == values[:, :-1]
    if is_tied.any():  # `topk` does not guarantee the order of ties
        tied = (is_tied & values[:, 1:].isfinite()).any(dim=1).nonzero().squeeze(1)
        ordered, order = log_probs[tied].sort(dim=1, descending=True, stable=True)
        values[tied], tokens[tied] = ordered[:, : values.shape[1]], order[:, : values.shape[1]]
    return values[:, :count], tokens[:, :count]


def _largest(log_probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the same as `topk` over (R, V), but faster.

    On a CPU, `topk` copies and partly sorts all V values. For many tokens, this function searches
    only the `count` blocks of tokens with the largest maxima, which contain the `count` largest
    values. If a token outside these blocks has the same value as one found, the last two values
    found are also equal, so the caller notices the tie.
    """
    num_tokens = log_probs.shape[1]
    if log_probs.is_cuda or log_probs.numel() < BLOCKS_FROM or num_tokens < BLOCK * count:
        return log_probs.topk(count, dim=1)
    num_blocks = num_tokens // BLOCK  # block b contains the tokens b, b + num_blocks, ...
    blocks = log_probs[:, : BLOCK * num_blocks].unflatten(1, (BLOCK, num_blocks))
    chosen = blocks.amax(dim=1).topk(count, dim=1).indices
    inside = blocks.gather(2, chosen.unsqueeze(1).expand(-1, BLOCK, -1)).flatten(1)
    rest = log_probs[:, BLOCK * num_blocks :]
    values, places = torch.cat([inside, rest], dim=1).topk(count, dim=1)
    block = chosen.gather(1, places.remainder(count))
    tokens = places.div(count, rounding_mode="floor").mul_(num_blocks).add_(block)
    if rest.shape[1]:
        past = places - inside.shape[1]
        tokens = torch.where(past < 0, tokens, past + BLOCK * num_blocks)
    return values, tokens


def _finish(
    candidates: _Candidates,
    rows: _Rows,
    finished: FinishedHypotheses,
    config: BeamConfig,
    eos: int,
    source_words: Tensor | None,
) -> None:
    """Score the hypotheses that end at this step, which are among the W best candidates."""
    first = slice(config.beam_size)
    is_end = candidates.tokens[:, first].eq(eos) & candidates.log_probs[:, first].gt(-torch.inf)
    sentence, rank = is_end.nonzero(as_tuple=True)
    if not sentence.numel():
        return
    ending, log_probs = candidates.rows[sentence, rank], candidates.log_probs[sentence, rank]
    scores = log_probs / config.penalty(rows.tokens.shape[1])
    beta = config.search.coverage_penalty_beta
    if beta:
        assert source_words is not None
        received = None if rows.received is None else rows.received[ending]
        scores = scores + beta * log_coverage(received, source_words[sentence])
    finished.add(sentence, ending, log_probs, scores)


def _goes_on(
    candidates: _Candidates,
    rows: _Rows,
    finished: FinishedHypotheses,
    config: BeamConfig,
    restrictions: Restrictions,
) -> Tensor:
    """Return (B, C) bool, True for the candidates that continue.

    These are the W best candidates that do not end. GNMT's pruning leaves out candidates that
    cannot lead to a good enough hypothesis.
    """
    goes_on = candidates.tokens.ne(restrictions.eos) & candidates.log_probs.gt(-torch.inf)
    goes_on &= goes_on.cumsum(dim=1) <= config.beam_size
    goes_on &= finished.is_open().unsqueeze(1)
    margin = config.search.beam_prune
    if margin:
        shortest = config.penalty(rows.tokens.shape[1] + 1)
        longest = config.penalty(restrictions.max_lengths + 1)
        bound = best_attainable(candidates.log_probs, shortest, longest.unsqueeze(1))
        goes_on &= within_margin(bound, finished.best.unsqueeze(1), margin)
    return goes_on


def _continue(candidates: _Candidates, rows: _Rows, goes_on: Tensor) -> tuple[_Rows, Tensor]:
    """Return the next step's rows and, for each of them, the row of this step that it continues."""
    sentence, index = goes_on.nonzero(as_tuple=True)
    parents = candidates.rows[sentence, index]
    tokens = candidates.tokens[sentence, index].unsqueeze(1)
    new_rows = _Rows(
        sentence,
        goes_on.cumsum(dim=1)[sentence, index] - 1,
        torch.cat([rows.tokens[parents], tokens], dim=1),
        candidates.log_probs[sentence, index],
        None if rows.received is None else rows.received[parents],
    )
    return new_rows, parents
