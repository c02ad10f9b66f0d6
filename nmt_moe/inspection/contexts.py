"""Find the contexts where each expert has its largest gates (Table 9 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Duplicate contexts are dropped, so more candidates are examined than are kept.
SPARE = 4


class TopContexts:
    """The tokens with the largest gates of each expert, in distinct contexts.

    Args:
        num_experts: Number of experts, E.
        most: Maximum number of contexts per expert.

    Source: Shazeer et al. 2017, Appendix E, Table 9.
    """

    def __init__(self, num_experts: int, most: int) -> None:
        self.num_experts, self.most = num_experts, most
        self._found: dict[int, list[dict[str, Any]]] = {}

    def add(
        self, expert_ids: Tensor, gates: Tensor, describe: Callable[[int], dict[str, Any]]
    ) -> None:
        """Add a batch of tokens.

        Args:
            expert_ids: (N, K) int64, the chosen experts; E in empty slots.
            gates: (N, K) float32, weights of the chosen experts.
            describe: Function that maps the index of a token to its `context` and further values.
        """
        width = expert_ids.shape[1]
        order = gates.flatten().argsort(descending=True, stable=True)
        order = order[expert_ids.flatten()[order].argsort(stable=True)]
        experts = expert_ids.flatten()[order]
        starts = torch.searchsorted(experts, torch.arange(self.num_experts))
        ends = torch.searchsorted(experts, torch.arange(self.num_experts), right=True)
        for expert in (ends > starts).nonzero().flatten().tolist():
            first, end = int(starts[expert]), int(ends[expert])
            chosen = order[first : min(end, first + SPARE * self.most)]
            values = gates.flatten()[chosen].tolist()
            self._merge(
                expert,
                [(g, i // width) for g, i in zip(values, chosen.tolist(), strict=True)],
                describe,
            )

    def _merge(
        self,
        expert: int,
        tokens: list[tuple[float, int]],
        describe: Callable[[int], dict[str, Any]],
    ) -> None:
        found = self._found.setdefault(expert, [])
        seen = {tuple(one["context"]) for one in found}
        num_old = len(found)
        for gate, token in tokens:
            is_full = len(found) - num_old >= self.most
            if is_full or (num_old >= self.most and gate <= found[self.most - 1]["gate"]):
                break
            row = {"gate": gate, **describe(token)}
            if tuple(row["context"]) not in seen:
                seen.add(tuple(row["context"]))
                found.append(row)
        found.sort(key=lambda one: -one["gate"])  # stable: ties keep the order of the text
        del found[self.most :]

    def of(self, expert: int) -> list[dict[str, Any]]:
        """Return the contexts of an expert, largest gate first."""
        return self._found.get(expert, [])
