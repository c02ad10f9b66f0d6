"""Choose the hypotheses that a step of the beam search continues.

The rows of a step are the live hypotheses; the rows of a sentence are consecutive, with the best
first. On a CPU, compiled loops do the same as the operations in torch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmt_moe.kernels import compiled_operators, has_compiled_loops
from nmt_moe.search.pruning import mask_tokens


@dataclass(frozen=True)
class Rows:
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
class Candidates:
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


@dataclass(frozen=True)
class Ended:
    """The candidates that end, among the W best of each sentence.

    Attributes:
        sentence: (N,) int64, the sentence of each candidate, in ascending order.
        rank: (N,) int64, the rank of each among the candidates of its sentence.
    """

    sentence: Tensor
    rank: Tensor


def find_candidates(
    next_log_probs: Tensor, rows: Rows, num_sentences: int, width: int, margin: float, eos: int
) -> tuple[Candidates, Ended]:
    """Find the best continuations of each sentence.

    Args:
        next_log_probs: (R, V), the log-probabilities of the next token.
        rows: The rows that the step has evaluated.
        num_sentences: Number of sentences, B.
        width: Beam size, W.
        margin: Margin of GNMT's pruning of tokens, in nats; 0 for none.
        eos: The end mark.

    Returns:
        The candidates, and those that end. If candidates are equal, the one from the better row
        comes first, and within a row, the one with the smaller token.
    """
    operators = _operators(next_log_probs, rows.log_probs)
    if operators is None:
        found = _find_in_torch(next_log_probs, rows, num_sentences, width, margin)
        first = slice(width)
        is_end = found.tokens[:, first].eq(eos) & found.log_probs[:, first].gt(-torch.inf)
        return found, Ended(*is_end.nonzero(as_tuple=True))
    log_probs, tokens, parents, *ended = operators.best_candidates(
        next_log_probs, rows.log_probs, rows.sentence, num_sentences, width, margin, eos
    )
    return Candidates(log_probs, tokens, parents), Ended(*ended)


def next_rows(
    candidates: Candidates,
    is_open: Tensor,
    is_kept: Tensor | None,
    width: int,
    eos: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose the rows of the next step: the W best candidates of each sentence that do not end.

    Args:
        candidates: The candidates of this step.
        is_open: (B,) bool, True for a sentence that accepts more hypotheses.
        is_kept: (B, C) bool, False for a candidate that pruning removes; None to keep all.
        width: Beam size, W.
        eos: The end mark.

    Returns:
        For each new row, (R',): its sentence, its rank, the row of this step that it continues, its
        last token, and its log-probability.
    """
    log_probs, tokens, parents = candidates.log_probs, candidates.tokens, candidates.rows
    operators = _operators(log_probs)
    if operators is not None:
        return operators.next_rows(log_probs, tokens, parents, is_open, is_kept, width, eos)
    goes_on = tokens.ne(eos) & log_probs.gt(-torch.inf)
    goes_on &= goes_on.cumsum(dim=1) <= width
    goes_on &= is_open.unsqueeze(1)
    if is_kept is not None:
        goes_on &= is_kept
    sentence, index = goes_on.nonzero(as_tuple=True)
    rank = goes_on.cumsum(dim=1)[sentence, index] - 1
    at = sentence, index
    return sentence, rank, parents[at], tokens[at], log_probs[at]


def _operators(*tensors: Tensor) -> Any:
    """Return the compiled loops if they accept these tensors, or None otherwise."""
    if tensors[0].dtype == torch.float32 and has_compiled_loops(*tensors):
        return compiled_operators()
    return None


def _find_in_torch(
    next_log_probs: Tensor, rows: Rows, num_sentences: int, width: int, margin: float
) -> Candidates:
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
    if margin:
        local = mask_tokens(local, local[:, :, 0].isfinite(), margin)
    totals = (so_far.view(shape[0], width, 1) + local).flatten(1)
    log_probs, order = totals.sort(dim=1, descending=True, stable=True)
    order = order[:, : 2 * width]
    parents = torch.div(order, shape[2], rounding_mode="floor")
    return Candidates(
        log_probs[:, : 2 * width],
        all_tokens.reshape(num_sentences, -1).gather(1, order),
        all_rows.view(shape[:2]).gather(1, parents),
    )


def _best_tokens(log_probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best log-probabilities and tokens, (R, count) each; smaller tokens win ties."""
    count = min(count, log_probs.shape[1])
    # Find one more token, to see whether the last one is tied.
    values, tokens = log_probs.topk(min(count + 1, log_probs.shape[1]), dim=1)
    is_tied = values[:, 1:] == values[:, :-1]
    if is_tied.any():  # `topk` does not guarantee the order of ties
        tied = (is_tied & values[:, 1:].isfinite()).any(dim=1).nonzero().squeeze(1)
        ordered, order = log_probs[tied].sort(dim=1, descending=True, stable=True)
        values[tied], tokens[tied] = ordered[:, : values.shape[1]], order[:, : values.shape[1]]
    return values[:, :count], tokens[:, :count]
