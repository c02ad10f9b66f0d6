"""Check the inputs to an MoE layer."""

import torch
from torch import Tensor

from nmt_moe.checks import check_like, check_shape
from nmt_moe.moe.config import MoEConfig
from nmt_moe.moe.hierarchical_gate import HierarchicalNoise

Noise = Tensor | HierarchicalNoise


def check_inputs(
    config: MoEConfig,
    weight: Tensor,
    x: Tensor,
    padding_mask: Tensor | None,
    noise: Noise | None,
) -> None:
    """Reject tensors that do not match the layer's weights or each other.

    Raises:
        ValueError: if a tensor does not match. The message names it, its shape, dtype or device,
            and the requirement.
    """
    if x.dim() == 3:
        raise ValueError(
            f"`x` must have the shape (N, D) = (any, {config.model_dim}), but has "
            f"{tuple(x.shape)}. Flatten it: `x.flatten(0, 1)`."
        )
    check_shape("x", x, (None, config.model_dim), "(N, D)")
    is_autocast = torch.is_autocast_enabled(weight.device.type)
    check_like("x", x, None if is_autocast else weight.dtype, weight.device)
    if padding_mask is not None:
        check_shape("padding_mask", padding_mask, (len(x),), "(N,)")
        check_like("padding_mask", padding_mask, torch.bool, x.device)
    if noise is not None:
        _check_noise(config, noise, x)


def _check_noise(config: MoEConfig, noise: Noise, x: Tensor) -> None:
    """Reject noise that differs in form from the noise that the gate draws."""
    if config.gate != "noisy_top_k":
        raise ValueError(f"`noise` must be None with the gate '{config.gate}', which has no noise.")
    num_groups, num_experts = config.num_groups, config.num_experts
    parts = noise if isinstance(noise, tuple) else (noise,)
    is_pair = isinstance(noise, tuple) and len(noise) == 2
    if is_pair != bool(num_groups) or not all(isinstance(part, Tensor) for part in parts):
        wanted = (
            "a tuple of two tensors, (N, G) and (N, E)," if num_groups else "one tensor, (N, E),"
        )
        raise ValueError(
            f"`noise` must be {wanted} with num_groups = {num_groups}, but is "
            f"({', '.join(type(part).__name__ for part in parts)})."
        )
    if num_groups:
        check_shape("noise[0]", parts[0], (len(x), num_groups), "(N, G)")
    check_shape("noise", parts[-1], (len(x), num_experts), "(N, E)")
    for part in parts:
        check_like("noise", part, None, x.device)
