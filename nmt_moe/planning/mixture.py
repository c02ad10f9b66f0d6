"""Formulas for the products of an MoE layer, and for the memory it keeps for the backward pass.

The layer's operations are fused and depend on the values of tensors, so torch cannot report them
when it knows only shapes. A test compares these formulas with the numbers that torch reports.

N is the number of tokens on one side on a device, D the width of the model, H the hidden width of
an expert, E the number of experts, G the number of groups, and K the number of experts (or groups)
per token.
"""

from __future__ import annotations

import math

from torch import Tensor

from nmt_moe.moe import MoEConfig
from nmt_moe.planning.batch import Batch


def rows_per_token(moe: MoEConfig) -> int:
    """Return the number of experts per token (the mean, with a strictly balanced gate)."""
    if moe.gate == "softmax":
        return moe.num_experts
    return moe.top_k**2 if moe.num_groups else moe.top_k


def gate_products(moe: MoEConfig, weight: Tensor, tokens: int) -> tuple[int, int]:
    """Return the number of rows that a gate's weight multiplies, and the number of its matrices.

    A single matrix, (D, E), multiplies all tokens. If there are G matrices, (D, E / G), each token
    is multiplied by the K matrices of its groups.
    """
    return (tokens, 1) if weight.dim() == 2 else (tokens * moe.top_k, len(weight))


def ranks_per_token(moe: MoEConfig, size: int) -> float:
    """Return the mean number of ranks, out of `size`, that hold any of a token's experts.

    All experts are assumed to be equally likely. A rank does not receive a token that chooses only
    experts on other ranks. Choices are made without replacement, among experts or, in a hierarchy
    (which keeps each group on one rank), among groups.
    """
    if moe.gate == "softmax":
        return size
    choices = moe.num_groups or moe.num_experts
    others = choices - choices // size
    if moe.gate == "strictly_balanced":  # each expert chooses its tokens
        return size * (1 - (1 - moe.top_k / choices) ** (choices // size))
    return size * (1 - math.comb(others, moe.top_k) / math.comb(choices, moe.top_k))


def kept_by_mixture(moe: MoEConfig, batch: Batch, size: int) -> dict[str, float]:
    """Return the bytes that a layer keeps, by part, if its experts are spread over `size` ranks."""
    dim, rows, number = moe.model_dim, rows_per_token(moe), batch.number_bytes
    # The layer keeps the tokens and, in half precision, their float32 copy for the gate. Its
    # outputs are not counted here, because the sigmoid that follows keeps them.
    tokens = (number if number == 4 else number + 4) * dim
    hidden = 0 if moe.recomputes else rows * moe.hidden_dim * number
    if not batch.on_cpu:
        hidden += 2 * rows * dim * number  # the inputs and outputs of each row
    exchange = 0.0
    if size > 1:
        slots = (8 + 8 + 4 + 1) * rows
        exchange = ranks_per_token(moe, size) * (2 * dim * number + slots + 8)
        exchange += (8 + 4) * rows
    return {
        "gates": batch.tokens * _gate_bytes(moe),
        "experts": batch.tokens * (tokens + hidden),
        "exchange": batch.tokens * exchange,
    }


def _gate_bytes(moe: MoEConfig) -> float:
    """Return the bytes that a gate keeps for one token: fp32 logits and the choices."""
    k, groups = moe.top_k, moe.num_groups
    level = 17 if moe.gate == "strictly_balanced" else 8  # bytes per logit, in all tensors together
    if moe.gate == "softmax":
        return 12 * moe.num_experts + 28 * moe.num_experts
    if not groups:
        return level * moe.num_experts + 16 * (k + 1) + 28 * k + 8
    primary = level * groups + 16 * (k + 1) + 28 * k + 8
    row = level * moe.num_experts / groups + 16 * (k + 1) + 12 * k + 4 + 4 * moe.model_dim
    return primary + k * row + 20 * k**2 + 4
