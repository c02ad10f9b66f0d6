"""Turn the single expert of a dense layer into several experts."""

from __future__ import annotations

from dataclasses import replace

import torch

from nmt_moe.checks import check_whole
from nmt_moe.moe import MoEConfig
from nmt_moe.resizing.layers import Layer


def upcycle(layer: Layer, num_experts: int, top_k: int) -> Layer:
    """Return a layer with several copies of another layer's single expert.

    The gate's weights start at zero, as in a new layer, and the gates of a token sum to 1, so the
    output does not depend on which experts the token is sent to. During training, the gate's noise
    sends different tokens to different copies, so they learn different things. A token needs
    `top_k` times as many operations as before.

    Args:
        layer: A layer with one expert.
        num_experts: Number of experts in the new layer, E.
        top_k: Number of experts per token, K.

    Raises:
        ValueError: if the layer has several experts, or a number is out of range.

    Source: Komatsuzaki et al. 2023, "Sparse Upcycling".
    """
    check_whole("num_experts", num_experts, 2)
    if layer.moe.num_experts != 1:
        raise ValueError(
            f"the model has {layer.moe.num_experts} experts in a layer, but only a single expert "
            "can be upcycled. Name a dense model, such as one with `--arch lstm_gnmt_small`."
        )
    moe: MoEConfig = replace(layer.moe, num_experts=num_experts, top_k=top_k)
    gate = {
        name: torch.zeros(*value.shape[:-1], num_experts, dtype=value.dtype)
        for name, value in layer.gate.items()
    }
    if "threshold" in gate:  # while the weights are zero, all experts have this probability
        gate["threshold"].fill_(1 / num_experts)
    experts = {
        name: value.expand(num_experts, *value.shape[1:]).contiguous()
        for name, value in layer.experts.items()
    }
    return replace(layer, moe=moe, gate=gate, experts=experts)
