"""The paper's equations, computed simply and slowly, token by token and expert by expert."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.moe import MoEConfig, MoELayer


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def squared_cv(values: Tensor) -> Tensor:
    return values.var(unbiased=False) / values.mean() ** 2


def noisy_top_k(x: Tensor, gate_weight: Tensor, noise_weight: Tensor, noise: Tensor, top_k: int):
    """Return a token's (n,) gates (eqs. 3-5) and probabilities of being chosen (eqs. 8-9)."""
    clean = x @ gate_weight
    scale = F.softplus(x @ noise_weight) + 1e-2
    noisy = clean + noise * scale
    kept = noisy.argsort(descending=True)[:top_k]
    masked = torch.full_like(noisy, -math.inf)
    masked[kept] = noisy[kept]
    if top_k == len(noisy):
        return masked.softmax(0), torch.ones_like(noisy)
    probs = []
    for e in range(len(noisy)):
        others = torch.cat([noisy[:e], noisy[e + 1 :]])
        kth_excluding = others.sort(descending=True).values[top_k - 1]
        probs.append(normal_cdf((clean[e] - kth_excluding) / scale[e]))
    return masked.softmax(0), torch.stack(probs)


def strictly_balanced(x: Tensor, gate_weight: Tensor, threshold: Tensor, top_k: int):
    """Return a batch's (N, n) gates (eqs. 15-16, 18), its mask, and the summed loss of eq. 20."""
    probs = (x @ gate_weight).softmax(1)
    num_tokens, num_experts = probs.shape
    share = math.ceil(top_k * num_tokens / num_experts)
    mask = torch.zeros_like(probs)
    for e in range(num_experts):
        mask[probs[:, e].argsort(descending=True)[:share], e] = 1
    gates = []
    for row, row_mask in zip(probs, mask, strict=True):
        total = (row * row_mask).sum()
        gates.append(row * row_mask / total if row_mask.any() else row * 0)
    loss = x.new_zeros(())
    for j in range(num_tokens):
        for i in range(num_experts):
            score = probs[j, i].detach()  # the loss trains only the thresholds
            loss = loss + (float(score > threshold[i]) - mask[j, i]) * (score - threshold[i])
    return torch.stack(gates) if gates else probs, mask, loss


def dense_gates(layer: MoELayer, x: Tensor, noise) -> tuple[Tensor, Tensor, Tensor]:
    """Return a training batch's (N, E) gates, (E,) load, and the mean threshold loss."""
    gate, config = layer.gate, layer.config
    none = x.new_zeros(())
    if config.num_groups:
        dense = _noisy_hierarchy if config.gate == "noisy_top_k" else _strict_hierarchy
        return dense(gate, config, x, noise)
    if config.gate == "softmax":
        return (x @ gate.gate_weight).softmax(1), x.new_full((config.num_experts,), len(x)), none
    if config.gate == "strictly_balanced":
        gates, mask, loss = strictly_balanced(x, gate.gate_weight, gate.threshold, config.top_k)
        return gates, mask.sum(0), loss / len(x)
    pairs = [
        noisy_top_k(x_t, gate.gate_weight, gate.noise_weight, noise_t, config.top_k)
        for x_t, noise_t in zip(x, noise, strict=True)
    ]
    gates, probs = (torch.stack(rows) for rows in zip(*pairs, strict=True))
    return gates, probs.sum(0), none


def _noisy_hierarchy(gate, config: MoEConfig, x: Tensor, noise):
    """Compute eqs. 12-14 with noisy top-k gates."""
    size, top_k = config.group_size, config.top_k
    group_loads = [x.new_zeros(size) for _ in range(config.num_groups)]
    group_tokens = [0] * config.num_groups
    all_gates, primary_load = [], x.new_zeros(config.num_groups)
    for t, x_t in enumerate(x):
        primary, primary_probs = noisy_top_k(
            x_t, gate.primary.gate_weight, gate.primary.noise_weight, noise[0][t], top_k
        )
        primary_load = primary_load + primary_probs
        parts = []
        for g in range(config.num_groups):
            secondary, probs = noisy_top_k(
                x_t,
                gate.secondary.gate_weight[g],
                gate.secondary.noise_weight[g],
                noise[1][t, g * size : (g + 1) * size],
                top_k,
            )
            parts.append(primary[g] * secondary)
            if primary[g] > 0:
                group_loads[g] = group_loads[g] + probs
                group_tokens[g] += 1
        all_gates.append(torch.cat(parts))
    load = torch.cat(
        [
            primary_load[g] * group_loads[g] / max(group_tokens[g], 1)
            for g in range(config.num_groups)
        ]
    )
    return torch.stack(all_gates), load, x.new_zeros(())


def _strict_hierarchy(gate, config: MoEConfig, x: Tensor, noise):
    """Compute strict balance over the groups, and in each group over the tokens sent to it."""
    primary, group_mask, loss = strictly_balanced(
        x, gate.primary.gate_weight, gate.primary.threshold, config.top_k
    )
    gates = x.new_zeros(len(x), config.num_experts)
    loads, inner_loss = [], x.new_zeros(())
    for g in range(config.num_groups):
        tokens = group_mask[:, g].nonzero().flatten()
        secondary, mask, group_loss = strictly_balanced(
            x[tokens], gate.secondary.gate_weight[g], gate.secondary.threshold[g], config.top_k
        )
        inner_loss = inner_loss + group_loss
        spread = primary[tokens, g].unsqueeze(1) * secondary
        columns = torch.arange(g * config.group_size, (g + 1) * config.group_size)
        gates = gates.index_put((tokens.unsqueeze(1), columns), spread)
        # In eq. 14, the primary load is the group's count, so the factors cancel.
        loads.append(mask.sum(0))
    pairs = group_mask.sum()
    return gates, torch.cat(loads), loss / len(x) + inner_loss / pairs


def dense_forward(layer: MoELayer, x: Tensor, noise) -> dict[str, Tensor]:
    """Compute a differentiable training pass by the paper's equations."""
    config = layer.config
    gates, load, threshold_loss = dense_gates(layer, x, noise)
    answers = torch.stack(
        [
            torch.relu(x @ layer.experts.weight_in[e]) @ layer.experts.weight_out[e]
            for e in range(config.num_experts)
        ],
        dim=1,
    )
    importance = gates.sum(0)
    sizes = (config.num_groups, config.group_size) if config.num_groups else (config.num_experts,)
    chooses = config.gate == "noisy_top_k" and config.top_k < max(sizes)
    return {
        "y": (gates.unsqueeze(2) * answers).sum(1),  # eq. 1
        "importance": importance,
        "load": load,
        "balance_loss": config.importance_weight * squared_cv(importance)
        + (config.load_weight * squared_cv(load) if chooses else 0.0)
        + threshold_loss,
    }
