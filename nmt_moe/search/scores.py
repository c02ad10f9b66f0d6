"""GNMT's score for finished hypotheses: log P(Y|X) / lp(Y) + beta * coverage.

The length of a hypothesis, |Y|, includes its end mark, which is a step with its own probability and
attention. The source's end mark and padding are not source words and need not be covered. A
language token in the source counts as a word.

Source: Wu et al. 2016, section 7, eq. 14.
"""

import torch
from torch import Tensor

# Smaller attention counts as this value, so that a word without attention costs beta * 13.8 instead
# of infinity (in half precision, attention underflows to 0). It is also the smallest attention
# above 0 that fairseq-generate prints, so printed attention reproduces the search's scores.
COVERAGE_FLOOR = 1e-6


def length_penalty(length: float | Tensor, alpha: float) -> float | Tensor:
    """Compute lp(Y) = ((5 + |Y|) / 6)^alpha.

    Args:
        length: Number of target tokens, including the end mark.
        alpha: Exponent of the penalty; with 0, the result is 1 for every length.

    Source: Wu et al. 2016, section 7.
    """
    return ((5.0 + length) / 6.0) ** alpha


def log_coverage(attention: Tensor | None, source_words: Tensor) -> Tensor:
    """Compute the sum over source words of log(min(attention received, 1)).

    Args:
        attention: (N, S), the attention that each source position received over all steps of a
            hypothesis.
        source_words: (N, S) bool, False for padding and the end mark, which do not count.

    Returns:
        (N,) float32 or wider, the sums in nats, at most 0. `beta` times the sum is the coverage
        penalty. Each word contributes at least log(COVERAGE_FLOOR).

    Raises:
        ValueError: if the model returns no attention, or attention over something other than the
            source.

    Source: Wu et al. 2016, section 7.
    """
    num_positions = source_words.shape[1]
    if attention is None or attention.shape[1] != num_positions:
        found = "none" if attention is None else f"over {attention.shape[1]} positions"
        raise ValueError(
            f"`--coverage-penalty-beta` needs attention over the {num_positions} source positions, "
            f"but the model returns {found}. Set the option to 0."
        )
    wide = attention.to(torch.promote_types(attention.dtype, torch.float32))
    logs = wide.clamp(min=COVERAGE_FLOOR, max=1.0).log()
    # Select instead of multiplying, because values at padding may be NaN.
    return torch.where(source_words, logs, 0.0).sum(dim=1)


def normalised_score(
    log_probability: Tensor, length: float | Tensor, coverage: Tensor, alpha: float, beta: float
) -> Tensor:
    """Score finished hypotheses.

    Args:
        log_probability: (N,), log P(Y|X), in nats.
        length: Number of target tokens, including the end mark, as one number or as (N,).
        coverage: (N,), the result of `log_coverage`; ignored if beta is 0.
        alpha: Exponent of the length penalty.
        beta: Weight of the coverage penalty.

    Returns:
        (N,), the scores.

    Source: Wu et al. 2016, section 7, eq. 14.
    """
    score = log_probability / length_penalty(length, alpha)
    return score + beta * coverage if beta else score
