"""Merge several experts into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.resizing.layers import Layer


def merge(layer: Layer, kept: Sequence[int], shares: Tensor) -> Layer:
    """Merge each expert that is not kept into the most similar kept expert.

    Two experts are similar if the gate gives them similar scores for each token. Similarity is
    measured by the cosine of their columns in the gate's weight. After hidden units have been
    matched, the weights of merged experts are averaged, each expert weighted by its share. Their
    columns in the gate's parameters are averaged in the same way.

    Args:
        layer: The layer to change.
        kept: Ids of the experts to keep; with groups, the same number from each group.
        shares: (E,), each expert's share of the layer's use on a text, as `survey.shares` returns.

    Returns:
        The layer with only the experts `kept`. Each of them is the weighted mean of itself and the
        experts merged into it.

    Source: Li et al. 2024, "Merge, Then Compress" (MC-SMoE).
    """
    kept = sorted(kept)
    columns = gate_columns(layer)
    owners = assign(columns, kept, layer.moe.num_groups)
    weight_in, weight_out = (value.clone() for value in layer.float_experts())
    weights = shares.to(weight_in.dtype).clamp_min(1e-12)
    gates = {name: value.clone() for name, value in layer.gate.items()}
    for expert in kept:
        members = [other for other, owner in enumerate(owners) if owner == expert]
        if len(members) == 1:
            continue
        share = weights[members] / weights[members].sum()
        matched = [match_units(weight_in, weight_out, expert, other) for other in members]
        weight_in[expert] = sum(s * one[0] for s, one in zip(share, matched, strict=True))
        weight_out[expert] = sum(s * one[1] for s, one in zip(share, matched, strict=True))
        _average_columns(layer, gates, expert, members, share)
    changed = replace(layer.with_experts(weight_in, weight_out), gate=gates)
    return changed.take(kept)


def assign(columns: Tensor, kept: Sequence[int], num_groups: int) -> list[int]:
    """Return, for each of E experts, the kept expert that it is merged into.

    An expert that is kept is merged into itself. With groups, experts are merged only within their
    group.

    Args:
        columns: (E, D), the gate's weights for each expert.
        kept: Ids of the experts to keep.
        num_groups: Number of groups of a hierarchical gate, G; 0 for a flat gate.
    """
    likeness = F.normalize(columns.float(), dim=1)
    likeness = likeness @ likeness[list(kept)].t()
    if num_groups:
        size = len(columns) // num_groups
        group = torch.arange(len(columns)) // size
        is_other = group.unsqueeze(1) != group[list(kept)]
        likeness = likeness.masked_fill(is_other, -2.0)
    owners = [kept[index] for index in likeness.argmax(dim=1).tolist()]
    for expert in kept:
        owners[expert] = expert
    return owners


def gate_columns(layer: Layer) -> Tensor:
    """Return the gate's weights for each expert, (E, D)."""
    weight = layer.gate["secondary_gate_weight" if layer.moe.num_groups else "gate_weight"]
    return weight.mT.flatten(0, -2)


def match_units(
    weight_in: Tensor, weight_out: Tensor, one: int, other: int
) -> tuple[Tensor, Tensor]:
    """Reorder the hidden units of an expert to match the units of another expert.

    Args:
        weight_in: (E, D, H), the experts' first matrices.
        weight_out: (E, H, D), the experts' second matrices.
        one: Id of the expert that sets the order.
        other: Id of the expert to reorder. Its outputs do not change.

    Returns:
        The matrices of `other` with reordered units, (D, H) and (H, D).

    Source: Ainsworth et al. 2023, "Git Re-Basin", weight matching.
    """
    if one == other:
        return weight_in[one], weight_out[one]
    from scipy.optimize import linear_sum_assignment

    likeness = weight_in[one].t() @ weight_in[other] + weight_out[one] @ weight_out[other].t()
    order = torch.from_numpy(linear_sum_assignment(likeness.double().numpy(), maximize=True)[1])
    return weight_in[other][:, order], weight_out[other][order]


def _average_columns(
    layer: Layer, gates: dict[str, Tensor], expert: int, members: list[int], share: Tensor
) -> None:
    """Set a kept expert's column in the gate's parameters to the mean of the members' columns."""
    for name, value in gates.items():
        if name.startswith("primary."):
            continue
        size = value.shape[-1]
        group = expert // size
        columns = value[group] if layer.moe.num_groups else value
        local = [member % size for member in members]
        columns[..., expert % size] = columns[..., local] @ share.to(columns.dtype)
