"""Measure how decisive gates are and how much experts differ: signs of specialised experts.

Balance (`nmt_moe.moe.stats`) shows whether all experts are used; these values show whether it
matters which ones.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gate_entropy(gates: Tensor) -> Tensor:
    """Compute the entropy of each token's gates.

    A new gate weights all chosen experts equally (entropy log K); the entropy falls as it learns.

    Args:
        gates: (N, K) non-negative; rows without an expert are 0.

    Returns:
        (N,) in nats, from 0 to log K.
    """
    return torch.special.entr(gates).sum(1)


def gate_margin(gates: Tensor) -> Tensor:
    """Compute the difference between each token's largest and second largest gate.

    Args:
        gates: (N, K) non-negative; rows without an expert are 0.

    Returns:
        (N,) from 0 to 1; the gate itself if K is 1.
    """
    if gates.shape[1] == 1:
        return gates.squeeze(1)
    largest = gates.topk(2, dim=1).values
    return largest[:, 0] - largest[:, 1]


def routing_saturation(before: Tensor, after: Tensor, num_experts: int) -> Tensor:
    """Compute the share of experts that tokens keep from one checkpoint to another.

    Args:
        before: (N, K1) int64, experts of each token in the earlier checkpoint; `num_experts` in
            empty slots.
        after: (N, K2) int64, experts of each token in the later checkpoint.
        num_experts: Number of experts, E.

    Returns:
        A scalar from 0 to 1: the share of (token, expert) pairs of `after` that are in `before`.
        With random gates it is K1 / E.

    Source: Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), section 5.1.
    """
    is_kept = (after.unsqueeze(2) == before.unsqueeze(1)).any(2) & (after < num_experts)
    return is_kept.sum() / (after < num_experts).sum().clamp_min(1)


def expert_outputs(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """Compute every expert's output for every token, chosen or not.

    Args:
        x: (N, D) tokens.
        weight_in: (E, D, H), the experts' first matrices.
        weight_out: (E, H, D), the experts' second matrices.

    Returns:
        (E, N, D).
    """
    return F.relu(x @ weight_in) @ weight_out


def output_similarity(outputs: Tensor) -> Tensor:
    """Compute the mean cosine between two experts' outputs for the same token.

    Args:
        outputs: (E, N, D), of at least two experts.

    Returns:
        A scalar: 1 for copies of one expert, near 0 for experts with nothing in common.

    Raises:
        ValueError: if there are fewer than two experts.
    """
    num_experts = len(outputs)
    if num_experts < 2:
        raise ValueError(f"`outputs` must be those of at least 2 experts, but is of {num_experts}.")
    # The squared norm of a sum of unit vectors is twice the sum of all cosines, plus 1 per vector.
    squares = F.normalize(outputs, dim=2).sum(0).square().sum(1)
    return ((squares - num_experts) / (num_experts * (num_experts - 1))).mean()
