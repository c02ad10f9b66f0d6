"""Estimate the loss of a softmax over many classes from a few of them, by importance sampling.

The softmax's negative log-likelihood is log Z - logit_target, where Z = sum_i exp(logit_i) over all
V classes. This module estimates Z. The target always counts. Any other class counts only if it was
drawn, and its term is divided by the probability of being drawn:

    Z^ = exp(logit_target) + sum of exp(logit_i) / P(i is drawn) over drawn i except the target

Z^ is unbiased: for any number of draws, its expected value is Z, and the expected value of its
gradient is the gradient of Z. log Z^, and hence the loss and its gradient, are only consistent: the
bias falls as 1 / draws, and the loss is too low on average (Jensen's inequality). If every class is
certain to be drawn, all estimates are exact.

Classes are drawn with replacement and duplicates are dropped, because P(i is drawn) is then known
to be 1 - (1 - p_i)^draws. If classes were drawn until there was a given number of distinct classes,
this probability would be unknown. If each class were counted as often as it was drawn, the expected
value would be the same, but the variance would be larger, especially where p_i is large. Without
duplicates, N draws give fewer than N classes: about 4600 for N = 8192 and V = 793,471.

Source: Jozefowicz et al. 2016 (arXiv 1602.02410), section 3.1; Bengio and Senecal 2003.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.checks import check_range


@dataclass(frozen=True)
class ClassSample:
    """Classes drawn for one batch.

    Attributes:
        ids: (S,) int64, distinct, in order of rank.
        expected_count: (S,) float64, for each class, the probability that it is drawn, in (0, 1].
    """

    ids: Tensor
    expected_count: Tensor


def log_uniform_probability(rank: Tensor, num_classes: int) -> Tensor:
    """Return the (nearly Zipfian) probability that one draw is the class of a given rank.

    Args:
        rank: int64, from 0, the most frequent class, to V - 1.
        num_classes: Number of classes, V.

    Returns:
        float64, log((rank + 2) / (rank + 1)) / log(V + 1); sums to 1 over all ranks.
    """
    return torch.log1p(1 / (rank.double() + 1)) / math.log(num_classes + 1)


def draw_classes(
    num_draws: int, num_classes: int, first_id: int = 0, device: torch.device | str = "cpu"
) -> ClassSample:
    """Draw classes, frequent ones more often, with torch's generator for the device.

    Args:
        num_draws: Number of draws, with replacement; at most V.
        num_classes: Number of classes, V.
        first_id: The most frequent class. Higher ids are less and less frequent, and the ids
            below `first_id` are the rarest: rank r has the id (first_id + r) % V.
        device: Device of the result.

    Raises:
        ValueError: if a number is out of range.
    """
    check_range("num_draws", num_draws, 1, num_classes)
    check_range("first_id", first_id, 0, num_classes - 1)
    uniform = torch.rand(num_draws, dtype=torch.float64, device=device)
    # The distribution function at rank r is log(r + 2) / log(V + 1).
    rank = (uniform * math.log(num_classes + 1)).exp().long() - 1
    rank = rank.clamp_(0, num_classes - 1).unique()
    missed = torch.log1p(-log_uniform_probability(rank, num_classes)) * num_draws
    return ClassSample((rank + first_id) % num_classes, -torch.expm1(missed))


def sampled_nll(features: Tensor, weight: Tensor, target: Tensor, sample: ClassSample) -> Tensor:
    """Estimate the negative log-likelihood of a softmax layer from a few of its classes.

    The estimate of the partition sum is unbiased, but the estimate of its logarithm is too low on
    average. The bias of the result and of its gradient falls as 1 / draws.

    A drawn class that is a token's target (an accidental hit) does not count as drawn for that
    token.

    Args:
        features: (N, D), the inputs to the softmax layer.
        weight: (V, D), the weight of the softmax layer.
        target: (N,) int64, the class to predict.
        sample: The classes drawn for all N tokens.

    Returns:
        (N,) float32 (float64 for float64 features), in nats.
    """
    num_drawn = len(sample.ids)
    # Gather once, so that the backward pass allocates just one gradient of the size of `weight`.
    rows = F.embedding(torch.cat([sample.ids, target]), weight)
    wide = torch.promote_types(features.dtype, torch.float32)
    target_logit = (features.to(wide) * rows[num_drawn:].to(wide)).sum(1)
    logits = (features @ rows[:num_drawn].t()).to(wide) - sample.expected_count.log().to(wide)
    hits = target.unsqueeze(1) == sample.ids
    logits = torch.cat([target_logit.unsqueeze(1), logits.masked_fill(hits, -math.inf)], dim=1)
    return logits.logsumexp(1) - target_logit
