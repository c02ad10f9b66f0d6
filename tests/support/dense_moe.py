"""The paper's equations token by token and expert by expert, as slow as they read."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.moe import MoELayer


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def squared_cv(values: Tensor) -> Tensor:
    return values.var(unbiased=False) / values.mean() ** 2


def dense_forward(layer: MoELayer, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Compute a training pass by eqs. 1, 3-11; gradients flow through everything."""
    config = layer.config
    num_experts, top_k = config.num_experts, config.top_k
    outputs, all_gates, all_probs = [], [], []
    for x_t, noise_t in zip(x, noise, strict=True):
        clean = x_t @ layer.gate.gate_weight
        scale = F.softplus(x_t @ layer.gate.noise_weight) + 1e-2
        noisy = clean + noise_t * scale
        kept = sorted(range(num_experts), key=lambda e: -noisy[e].item())[:top_k]  # noqa: B023
        masked = torch.full_like(noisy, -math.inf)
        masked[kept] = noisy[kept]
        gates = masked.softmax(0)
        probs = []
        for e in range(num_experts):
            others = torch.cat([noisy[:e], noisy[e + 1 :]])
            if top_k == num_experts:
                probs.append(torch.ones_like(clean[e]))
                continue
            kth_excluding = others.sort(descending=True).values[top_k - 1]
            probs.append(normal_cdf((clean[e] - kth_excluding) / scale[e]))
        answers = [
            torch.relu(x_t @ layer.experts.weight_in[e]) @ layer.experts.weight_out[e]
            for e in range(num_experts)
        ]
        outputs.append(sum(gates[e] * answers[e] for e in range(num_experts)))
        all_gates.append(gates)
        all_probs.append(torch.stack(probs))
    importance = torch.stack(all_gates).sum(0)
    load = torch.stack(all_probs).sum(0)
    load_weight = 0.0 if top_k == num_experts else config.load_weight
    return {
        "y": torch.stack(outputs),
        "importance": importance,
        "load": load,
        "balance_loss": config.importance_weight * squared_cv(importance)
        + load_weight * squared_cv(load),
    }
