"""Choose which experts to keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nmt_moe.checks import check_choice, check_whole
from nmt_moe.moe import MoEConfig

SCOPES = ("layer", "model")


def choose_experts(
    shares: Mapping[str, Tensor], moe: Mapping[str, MoEConfig], keep: int, scope: str = "layer"
) -> dict[str, list[int]]:
    """Choose the experts with the largest shares; smaller ids win ties.

    Args:
        shares: For each layer, (E,), the experts' shares, which sum to 1.
        moe: Configuration of each layer.
        keep: Number of experts to keep in each layer; with the scope "model", on average.
        scope: "layer" keeps the same number in each layer. "model" drops the experts with the
            smallest shares in all layers together, but leaves enough experts in each layer for a
            token to choose from.

    Returns:
        For each layer, the ids of the experts to keep, in ascending order.

    Raises:
        ValueError: if `keep` or `scope` is not allowed. The message gives the argument, the
            constraint and the value.
    """
    check_choice("scope", scope, SCOPES)
    counts = {name: one.num_experts for name, one in moe.items()}
    for name, one in moe.items():
        low = one.top_k * one.top_k if one.num_groups else one.top_k
        check_whole("num_experts", keep, low if one.gate != "softmax" else 1, counts[name])
        if one.num_groups and keep % one.num_groups:
            raise ValueError(
                f"`num_experts` must be a multiple of the number of groups, {one.num_groups}, but "
                f"is {keep}."
            )
    if scope == "layer":
        return {name: _best(shares[name], moe[name], keep) for name in moe}
    if any(one.num_groups for one in moe.values()):
        raise ValueError(
            "`scope` must be 'layer' for hierarchical gates, because all groups must have the "
            "same size, but is 'model'."
        )
    return _best_of_all(shares, moe, keep * len(moe))


def _best(shares: Tensor, moe: MoEConfig, keep: int) -> list[int]:
    groups = max(moe.num_groups, 1)
    by_group = shares.view(groups, -1)
    order = by_group.sort(dim=1, descending=True, stable=True).indices[:, : keep // groups]
    first = torch.arange(groups).unsqueeze(1) * by_group.shape[1]
    return sorted((order + first).flatten().tolist())


def _best_of_all(
    shares: Mapping[str, Tensor], moe: Mapping[str, MoEConfig], total: int
) -> dict[str, list[int]]:
    kept = {name: _best(shares[name], one, one.top_k) for name, one in moe.items()}
    others = [
        (-float(share), name, number)
        for name, values in shares.items()
        for number, share in enumerate(values.tolist())
        if number not in kept[name]
    ]
    room = total - sum(map(len, kept.values()))
    for _, name, number in sorted(others)[:room]:
        kept[name].append(number)
    return {name: sorted(numbers) for name, numbers in kept.items()}
