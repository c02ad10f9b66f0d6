"""GNMT's two kinds of pruning. Both keep values within a margin, in nats, of the best value.

Source: Wu et al. 2016, section 7 ("beamsize").
"""

import torch
from torch import Tensor


def mask_tokens(log_probs: Tensor, alive: Tensor, margin: float) -> Tensor:
    """Rule out tokens if their own log-probabilities are far below the best of the step.

    Tokens are compared with the best token of all hypotheses of a sentence, so a hypothesis that
    spreads its probability over many tokens loses to one with a clear favourite. The best token
    always stays.

    Args:
        log_probs: (B, W, V), log-probabilities of the next token; -inf if it is already ruled out.
        alive: (B, W) bool, True for a hypothesis with a probability above 0.
        margin: Largest difference from the sentence's best that is kept, in nats.

    Returns:
        (B, W, V), the log-probabilities, with -inf for tokens that are more than `margin` below
        the best of their sentence.
    """
    best_of_each = log_probs.amax(dim=2).masked_fill(~alive, -torch.inf)  # (B, W)
    lowest = best_of_each.amax(dim=1) - margin
    return log_probs.masked_fill(log_probs < lowest[:, None, None], -torch.inf)


def within_margin(scores: Tensor, best: Tensor | float, margin: float) -> Tensor:
    """Return whether each score of a finished hypothesis is at most `margin` below the best."""
    return scores >= best - margin


def best_attainable(
    log_probability: Tensor, next_penalty: float, last_penalty: float | Tensor
) -> Tensor:
    """Return an upper bound on the scores of all continuations of the given hypotheses.

    Additional tokens only lower the probability, and the coverage penalty only lowers the score.
    The length penalty is monotonic, so its extremes are at the shortest and the longest hypothesis.

    Args:
        log_probability: (N,), log-probabilities of the hypotheses, in nats, at most 0.
        next_penalty: Length penalty of the shortest hypothesis that is still possible.
        last_penalty: Length penalty of the longest hypothesis that is possible, as one number for
            all hypotheses or one for each.
    """
    return torch.maximum(log_probability / next_penalty, log_probability / last_penalty)
