"""GNMT's two prunings, both by a margin in nats below the best.

Source: Wu et al. 2016, section 7 ("beamsize").
"""

import torch
from torch import Tensor


def mask_tokens(log_probs: Tensor, alive: Tensor, margin: float) -> Tensor:
    """Rule out tokens whose own log-probability is far below the best of the step.

    The best is looked for in all hypotheses of a sentence, so a hypothesis that is unsure how to go
    on loses against one that is not; the best token itself always stays.

    Args:
        log_probs: (B, W, V) of the next token; -inf = ruled out before.
        alive: (B, W) bool, hypotheses whose own probability is not zero.
        margin: Nats.

    Returns:
        (B, W, V), with -inf for tokens more than `margin` below their sentence's best.
    """
    best_of_each = log_probs.amax(dim=2).masked_fill(~alive, -torch.inf)  # (B, W)
    lowest = best_of_each.amax(dim=1) - margin
    return log_probs.masked_fill(log_probs < lowest[:, None, None], -torch.inf)


def within_margin(scores: Tensor, best: Tensor | float, margin: float) -> Tensor:
    """Tell which normalised scores of finished hypotheses are close enough to the best."""
    return scores >= best - margin


def best_attainable(
    log_probability: Tensor, next_penalty: float, last_penalty: float | Tensor
) -> Tensor:
    """Bound the normalised score of all hypotheses that begin with a given one.

    More tokens only lower the probability, coverage only lowers the score, and the length penalty
    moves one way only, so it is extreme at the shortest or the longest hypothesis.

    Args:
        log_probability: (N,) nats, at most 0.
        next_penalty: Length penalty of the shortest hypothesis that is still possible.
        last_penalty: Length penalty of the longest, of all or of each.
    """
    return torch.maximum(log_probability / next_penalty, log_probability / last_penalty)
