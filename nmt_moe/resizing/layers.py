"""Stored MoE layers that can be changed by selecting, merging or copying experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmt_moe.inference.storing import store
from nmt_moe.inference.weights import DIGEST, EXPERTS_IN, EXPERTS_OUT, SCALE
from nmt_moe.moe import MoEConfig

# Prefixes of a hierarchical gate's parameters. Parameters of the second level have the shape
# (G, ..., E / G).
PRIMARY, SECONDARY = "primary.", "secondary_"


@dataclass(frozen=True)
class Layer:
    """The gate and the experts of one layer.

    Attributes:
        moe: Configuration of the layer.
        gate: Parameters of the gate by their names in its state dict: (..., E), or (G, ..., E / G)
            for a second level.
        experts: (E, ...) tensors of the experts by name, as stored. A checkpoint stores matrices of
            the shapes (E, D, H) and (E, H, D); a bundle stores their transposes.
        dtype: The dtype of the bundle; None for a checkpoint.
    """

    moe: MoEConfig
    gate: dict[str, Tensor]
    experts: dict[str, Tensor]
    dtype: str | None = None

    def take(self, ids: Sequence[int]) -> Layer:
        """Return the layer with some of its experts, in the given order.

        Args:
            ids: Ids of the experts; with groups, the same number from each group.

        Raises:
            ValueError: if there are too few experts, if some are repeated, or if groups would have
                different numbers of experts.
        """
        moe = replace(self.moe, num_experts=len(ids))
        index = torch.tensor(ids)
        if len(set(ids)) != len(ids):
            raise ValueError("`ids` must not repeat experts, but some are repeated.")
        local = self._by_group(index) if moe.num_groups else index
        experts = {name: value[index] for name, value in self.experts.items() if name != DIGEST}
        gate = {name: _take(name, value, local) for name, value in self.gate.items()}
        return replace(self, moe=moe, gate=gate, experts=experts)

    def _by_group(self, index: Tensor) -> Tensor:
        """Return the indices of experts within their groups, (G, E' / G)."""
        size = self.moe.group_size
        index = index.sort().values
        counts = (index // size).bincount(minlength=self.moe.num_groups)
        if counts.min() != counts.max():
            raise ValueError(
                "`ids` must contain the same number of experts from each group, but contains from "
                f"{int(counts.min())} to {int(counts.max())}."
            )
        return (index % size).view(self.moe.num_groups, -1)

    def float_experts(self) -> tuple[Tensor, Tensor]:
        """Return both matrices of every expert, (E, D, H) and (E, H, D), in float32 or wider."""
        found = []
        for name in (EXPERTS_IN, EXPERTS_OUT):
            value = self.experts[name]
            if self.dtype == "int8":
                value = value.float() * self.experts[name + SCALE].unsqueeze(2)
            elif value.dtype in (torch.bfloat16, torch.float16):
                value = value.float()
            found.append(value if self.dtype is None else value.mT)
        return found[0], found[1]

    def with_experts(self, weight_in: Tensor, weight_out: Tensor) -> Layer:
        """Return the layer with different experts, stored in the same way.

        Args:
            weight_in: (E', D, H), the experts' first matrices.
            weight_out: (E', H, D), the experts' second matrices.
        """
        experts: dict[str, Tensor] = {}
        for name, value in ((EXPERTS_IN, weight_in), (EXPERTS_OUT, weight_out)):
            if self.dtype is None:
                experts[name] = value.to(self.experts[name].dtype)
            else:
                experts |= store(name, value.mT, self.dtype)
        return replace(self, experts=experts)


def _take(name: str, value: Tensor, local: Tensor) -> Tensor:
    """Select the columns of some experts from a parameter of a gate."""
    if local.dim() == 1:
        return value[..., local].contiguous()
    if name.startswith(PRIMARY):
        return value
    index = local if value.dim() == 2 else local.unsqueeze(1).expand(-1, value.shape[1], -1)
    return value.gather(-1, index)
