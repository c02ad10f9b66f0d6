"""An MoE layer as stored, whose experts can be selected, merged or multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmt_moe.inference.storing import store
from nmt_moe.inference.weights import DIGEST, EXPERTS_IN, EXPERTS_OUT, SCALE
from nmt_moe.moe import MoEConfig

# A hierarchical gate keeps the first level's parameters under this prefix; those of the second
# level have the shape (G, ..., E / G).
PRIMARY, SECONDARY = "primary.", "secondary_"


@dataclass(frozen=True)
class Layer:
    """The gate and the experts of one layer.

    Attributes:
        moe: Sizes of the layer.
        gate: Parameters of the gate by their names in its state: (..., E), or (G, ..., E / G) for a
            second level.
        experts: (E, ...) tensors, as stored.
        dtype: The bundle's dtype; in a bundle, each output has a row. None for a checkpoint, with
            (E, D, H) and (E, H, D).
    """

    moe: MoEConfig
    gate: dict[str, Tensor]
    experts: dict[str, Tensor]
    dtype: str | None = None

    def take(self, ids: Sequence[int]) -> Layer:
        """Return the layer with some of its experts, in the order given.

        Args:
            ids: Ids of the experts; with groups, the same number from each group.

        Raises:
            ValueError: if there are too few, some are repeated, or groups have different numbers.
        """
        moe = replace(self.moe, num_experts=len(ids))
        index = torch.tensor(ids)
        if len(set(ids)) != len(ids):
            raise ValueError("`ids` must be different experts, but some are repeated.")
        local = self._by_group(index) if moe.num_groups else index
        experts = {name: value[index] for name, value in self.experts.items() if name != DIGEST}
        gate = {name: _take(name, value, local) for name, value in self.gate.items()}
        return replace(self, moe=moe, gate=gate, experts=experts)

    def _by_group(self, index: Tensor) -> Tensor:
        """Return the experts' indices within their groups: (G, E' / G)."""
        size = self.moe.group_size
        index = index.sort().values
        counts = (index // size).bincount(minlength=self.moe.num_groups)
        if counts.min() != counts.max():
            raise ValueError(
                "`ids` must have equally many experts from each group, but has from "
                f"{int(counts.min())} to {int(counts.max())}."
            )
        return (index % size).view(self.moe.num_groups, -1)

    def float_experts(self) -> tuple[Tensor, Tensor]:
        """Return both matrices of all experts, float32 or wider: (E, D, H) and (E, H, D)."""
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
        """Return the layer with other experts, stored in the same way.

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
    """Select columns of a gate's parameter."""
    if local.dim() == 1:
        return value[..., local].contiguous()
    if name.startswith(PRIMARY):
        return value
    index = local if value.dim() == 2 else local.unsqueeze(1).expand(-1, value.shape[1], -1)
    return value.gather(-1, index)
