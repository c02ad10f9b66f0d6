"""How many bytes the forward pass keeps for the backward pass, part by part.

Counted from what the layers of nmt_moe.nn and nmt_moe.moe save, tensor by tensor; a test holds the
sums against what torch saves. Letters: N tokens of a side on a device, D model dim, H cells of an
LSTM or hidden width of an expert, E experts, G groups, k experts (or groups) a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, LSTMLMConfig


@dataclass(frozen=True)
class Batch:
    """What one device reads at a time, without padding.

    Attributes:
        sentences: Of one batch of one device.
        length: Tokens of a sentence; of a translation, on each side.
        vocab_size: V.
        num_draws: Draws of the sampled softmax; 0 for the full one.
        number_bytes: Of an activation: 4, or 2 of half precision.
        on_cpu: CPUs keep masks of dropout as numbers, GPUs rows of experts twice.
    """

    sentences: int
    length: int
    vocab_size: int
    num_draws: int = 0
    number_bytes: int = 4
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Of one side."""
        return self.sentences * self.length

    @property
    def mask_bytes(self) -> int:
        """Of dropout, for one number."""
        return self.number_bytes if self.on_cpu else 1


def experts_per_token(moe: MoEConfig) -> int:
    """Return how many experts a token goes to; of strict balance, on average."""
    if moe.gate == "softmax":
        return moe.num_experts
    return moe.top_k**2 if moe.num_groups else moe.top_k


def visits_per_token(moe: MoEConfig, size: int) -> float:
    """Return how many of `size` ranks hold any of a token's experts, where all are equally likely.

    A rank is missed if all choices fall on others: drawn without replacement, as gates do for a
    token, of experts or (in a hierarchy, whose groups stay whole) of groups.
    """
    if moe.gate == "softmax":
        return size
    choices = moe.num_groups or moe.num_experts
    others = choices - choices // size
    if moe.gate == "strictly_balanced":  # each expert chooses its tokens
        return size * (1 - (1 - moe.top_k / choices) ** (choices // size))
    return size * (1 - math.comb(others, moe.top_k) / math.comb(choices, moe.top_k))


def distinct_classes(num_draws: int, vocab_size: int) -> float:
    """Return the mean number of different classes among draws of the sampled softmax."""
    rank = torch.arange(vocab_size, dtype=torch.float64)
    chance = torch.log1p(1 / (rank + 1)) / math.log(vocab_size + 1)
    return float(-torch.expm1(torch.log1p(-chance) * num_draws).sum())


def lstm_bytes(config: LSTMLMConfig | GNMTConfig, batch: Batch, input_dim: int) -> float:
    """Of one LSTM over N tokens: its input, output, four gates, cells and their tanh.

    A projection keeps its input as well. Without one, CPUs run oneDNN's LSTM, whose workspace has
    been measured: gates, states and room for all their gradients. cuDNN's may hold some more too.
    """
    dim, cells = config.model_dim, config.lstm_hidden_dim
    if batch.on_cpu and cells == dim:
        workspace = (15 + 12 / batch.length) * cells
        return batch.tokens * (workspace + dim + input_dim) * batch.number_bytes
    numbers = (7 if cells != dim else 6) * cells + dim + input_dim
    return batch.tokens * numbers * batch.number_bytes


def gate_bytes(moe: MoEConfig, batch: Batch) -> float:
    """Of a gate: logits of both levels, always in fp32, and the choice of each token."""
    k, groups = moe.top_k, moe.num_groups
    level = 17 if moe.gate == "strictly_balanced" else 8  # bytes for each logit, all tensors
    if moe.gate == "softmax":
        return batch.tokens * (12 * moe.num_experts + 28 * moe.num_experts)
    if not groups:
        return batch.tokens * (level * moe.num_experts + 16 * (k + 1) + 28 * k + 8)
    primary = level * groups + 16 * (k + 1) + 28 * k + 8
    row = level * moe.num_experts / groups + 16 * (k + 1) + 12 * k + 4 + 4 * moe.model_dim
    return batch.tokens * (primary + k * row + 20 * k**2 + 4)


def moe_bytes(moe: MoEConfig, batch: Batch, size: int) -> dict[str, float]:
    """Of an MoE layer whose experts are spread over `size` ranks, with what surrounds it."""
    dim, rows, number = moe.model_dim, experts_per_token(moe), batch.number_bytes
    gate_copy = 0 if number == 4 else 4 * dim
    around = (3 * number + batch.mask_bytes) * dim + gate_copy
    hidden = 0 if moe.recomputes else rows * moe.hidden_dim * number
    if not batch.on_cpu:
        hidden += 2 * rows * dim * number  # gathered tokens and answers, a row for each expert
    travel = 0.0
    if size > 1:
        visits = visits_per_token(moe, size)
        slots = (8 + 8 + number + 1) * rows
        travel = visits * (2 * dim * number + slots + 8) + (8 + number) * rows
    return {
        "gates": gate_bytes(moe, batch),
        "experts": batch.tokens * (around + hidden),
        "exchange": batch.tokens * travel,
    }


def softmax_bytes(config: LSTMLMConfig | GNMTConfig, batch: Batch) -> tuple[float, float]:
    """Return what the softmax layer keeps, and what it needs for a moment beside that."""
    features = batch.tokens * config.model_dim * batch.number_bytes
    if batch.num_draws:
        classes = distinct_classes(batch.num_draws, batch.vocab_size)
        rows = (classes + batch.tokens) * config.model_dim * batch.number_bytes
        return features + rows + batch.tokens * 5 * (classes + 1), batch.tokens * 8 * classes
    kept = 4 * batch.tokens * batch.vocab_size
    # The gradients of log-probabilities and of logits.
    return features + kept, 2 * kept


def count_activations(
    config: LSTMLMConfig | GNMTConfig, batch: Batch, size: int
) -> tuple[dict[str, int], int]:
    """Count what the forward pass of one batch keeps.

    Args:
        config: Sizes of the network.
        batch: Sizes of the batch.
        size: Ranks that share the experts.

    Returns:
        Bytes kept by part, and the bytes of the softmax layer's largest temporaries.
    """
    dim, mask = config.model_dim, batch.tokens * config.model_dim * batch.mask_bytes
    mask = mask if config.dropout > 0 else 0
    parts: dict[str, float] = {"LSTMs": 0.0, "embeddings": 0.0}
    number_moe = 0
    if isinstance(config, LSTMLMConfig):
        parts["embeddings"] += mask
        parts["LSTMs"] += config.lstm_layers * (lstm_bytes(config, batch, dim) + mask)
        number_moe = 1
    else:
        side = batch.tokens * dim * batch.number_bytes
        parts["embeddings"] += 2 * mask
        layers = config.encoder_layers + config.decoder_layers
        parts["LSTMs"] += layers * lstm_bytes(config, batch, dim) + (layers - 1) * mask
        # Keys and their source; of each query: itself, its tanh, that times V, and weights over S.
        parts["attention"] = 2 * side + batch.tokens * batch.length * 4
        parts["attention"] += (6 if config.attention_wiring == "recurrent" else 5) * side - side
        number_moe = 2
    if config.moe is not None and getattr(config, "expert_layers", 1) == 1:
        for part, count in moe_bytes(config.moe, batch, size).items():
            parts[part] = number_moe * count
    elif config.moe is not None:
        widths = config.expert_layers * config.moe.hidden_dim
        parts["experts"] = batch.tokens * (widths + 2 * dim) * batch.number_bytes + mask
    parts["softmax"], workspace = softmax_bytes(config, batch)
    return {part: round(count) for part, count in parts.items()}, round(workspace)
