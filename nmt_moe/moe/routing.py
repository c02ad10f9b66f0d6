"""Measure how decisive gates are and how much experts differ, as signs of specialised experts.

The balance (`nmt_moe.moe.stats`) shows whether all experts are used. The values in this module show
whether the choice of experts matters.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gate_entropy(gates: Tensor) -> Tensor:
    """Compute the entropy of each token's gates.

    A new gate weights all chosen experts equally, so its entropy is log K. The entropy falls as the
    gate learns.

    Args:
        gates: (N, K), non-negative; 0 for tokens without experts.

    Returns:
        (N,), the entropies in nats, from 0 to log K.
    """
    return torch.special.entr(gates).sum(1)


def gate_margin(gates: Tensor) -> Tensor:
    """Compute the difference between each token's largest and second-largest gates.

    Args:
        gates: (N, K), non-negative; 0 for tokens without experts.

    Returns:
        (N,), the differences, from 0 to 1; the gate itself if K is 1.
    """
    if gates.shape[1] == 1:
        return gates.squeeze(1)
    largest = gates.topk(2, dim=1).values
    return largest[:, 0] - largest[:, 1]


def routing_saturation(before: Tensor, after: Tensor, num_experts: int) -> Tensor:
    """Compute the fraction of experts that tokens keep from one checkpoint to another.

    Args:
        before: (N, K1) int64, the experts of each token in the earlier checkpoint; E in an empty
            slot.
        after: (N, K2) int64, the same in the later checkpoint.
        num_experts: Number of experts, E.

    Returns:
        A scalar from 0 to 1: the fraction of the (token, expert) pairs in `after` that are also in
        `before`. With random gates, it is K1 / E.

    Source: Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), section 5.1.
    """
    is_kept = (after.unsqueeze(2) == before.unsqueeze(1)).any(2) & (after < num_experts)
    return is_kept.sum() / (after < num_experts).sum().clamp_min(1)


def expert_outputs(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """Compute the output of every expert for every token, regardless of the gate's choice.

    Args:
        x: (N, D), the tokens' vectors.
        weight_in: (E, D, H), the experts' first matrices.
        weight_out: (E, H, D), the experts' second matrices.

    Returns:
        (E, N, D), the outputs.
    """
    return F.relu(x @ weight_in) @ weight_out


def output_similarity(outputs: Tensor) -> Tensor:
    """Compute the mean cosine similarity between two experts' outputs for the same token.

    Args:
        outputs: (E, N, D), the outputs of at least two experts.

    Returns:
        A scalar, the mean over all pairs of experts and all tokens for which neither output is
        zero; 0 if there are none. It is 1 for copies of one expert, and near 0 for experts that
        have nothing in common.

    Raises:
        ValueError: if there are fewer than two experts.
    """
    num_experts = len(outputs)
    if num_experts < 2:
        raise ValueError(
            f"`outputs` must have at least 2 experts in its first dimension, but has {num_experts}."
        )
    # The squared norm of a sum of unit vectors is twice the sum of the cosines of all pairs, plus 1
    # for each vector.
    squares = F.normalize(outputs, dim=2).sum(0).square().sum(1)
    counts = outputs.any(dim=2).sum(0)
    return (squares - counts).sum() / (counts * (counts - 1)).sum().clamp_min(1)
