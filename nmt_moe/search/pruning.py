"""GNMT's two kinds of pruning, both by a margin in nats below the best.

Source: Wu et al. 2016, section 7 ("beamsize").
"""

import torch
from torch import Tensor


def mask_tokens(log_probs: Tensor, alive: Tensor, margin: float) -> Tensor:
    """Rule out tokens whose own log-probability is far below the best of the step.

    The best is taken over all hypotheses of a sentence, so a hypothesis that is unsure how to
    continue loses against one that is not; the best token itself always stays.

    Args:
        log_probs: (B, W, V), for the next token; -inf = ruled out already.
        alive: (B, W) bool, hypotheses whose own probability is not zero.
        margin: Largest difference from the sentence's best that is kept, in nats.

    Returns:
        (B, W, V), with -inf for tokens more than `margin` below their sentence's best.
    """
    best_of_each = log_probs.amax(dim=2).masked_fill(~alive, -torch.inf)  # (B, W)
    lowest = best_of_each.amax(dim=1) - margin
    return log_probs.masked_fill(log_probs < lowest[:, None, None], -torch.inf)


def within_margin(scores: Tensor, best: Tensor | float, margin: float) -> Tensor:
    """Return which normalised scores of finished hypotheses are close enough to the best."""
    return scores >= best - margin


def best_attainable(
    log_probability: Tensor, next_penalty: float, last_penalty: float | Tensor
) -> Tensor:
    """Return an upper bound of the normalised scores of all continuations of given hypotheses.

    More tokens only lower the probability, coverage only lowers the score, and the length penalty
    is monotonic, so it is extreme for the shortest or the longest hypothesis.

    Args:
        log_probability: (N,) nats, at most 0.
        next_penalty: Length penalty of the shortest hypothesis that is still possible.
        last_penalty: Length penalty of the longest one, for all or for each.
    """
    return torch.maximum(log_probability / next_penalty, log_probability / last_penalty)
