"""Sum up the use of a layer's experts on a text, and compute the columns of Table 6."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from nmt_moe.checks import check_shape, check_whole
from nmt_moe.moe import balance_metrics, effective_experts, gate_entropy, gate_margin

# The counts for the pairs of this many experts take 32 MiB.
MAX_PAIRED_EXPERTS = 2048


class ExpertUsage:
    """Sums over the tokens of a text in one MoE layer, accumulated batch by batch.

    Attributes:
        num_experts: Number of experts, E.
        num_tokens: Number of tokens, N, including tokens without an expert.
        load: (E,) int64, the number of tokens sent to each expert.
        importance: (E,) float64, the sum of each expert's gates (Shazeer et al. 2017, eq. 6).
        squares: (E,) float64, the sum of each expert's squared gates.
        coactivation: (E, E) int64, the number of tokens sent to both experts, symmetric with 0 on
            the diagonal; None if there are more than `MAX_PAIRED_EXPERTS`.
    """

    def __init__(self, num_experts: int) -> None:
        check_whole("num_experts", num_experts, 1)
        self.num_experts, self.num_tokens = num_experts, 0
        self.load = torch.zeros(num_experts, dtype=torch.int64)
        self.importance = torch.zeros(num_experts, dtype=torch.float64)
        self.squares = torch.zeros(num_experts, dtype=torch.float64)
        self.coactivation: Tensor | None = None
        if num_experts <= MAX_PAIRED_EXPERTS:
            self.coactivation = torch.zeros(num_experts, num_experts, dtype=torch.int64)
        self._entropy = self._margin = 0.0

    def add(self, expert_ids: Tensor, gates: Tensor) -> None:
        """Add a batch.

        Args:
            expert_ids: (N, K) int64, the chosen experts; E in empty slots.
            gates: (N, K) float32 or wider, weights of the chosen experts; 0 in empty slots.

        Raises:
            ValueError: if the shapes differ, or an id is not from 0 to E.
        """
        check_shape("expert_ids", expert_ids, (None, None), "(N, K)")
        check_shape("gates", gates, tuple(expert_ids.shape), "(N, K)")
        num_experts = self.num_experts
        if not len(expert_ids):
            return
        if expert_ids.min() < 0 or expert_ids.max() > num_experts:
            raise ValueError(
                f"`expert_ids` must be from 0 to {num_experts}, but are from "
                f"{int(expert_ids.min())} to {int(expert_ids.max())}."
            )
        gates = gates.double()
        flat, weights = expert_ids.flatten(), gates.flatten()
        size = num_experts + 1  # the last element counts empty slots
        self.num_tokens += len(expert_ids)
        self.load += flat.bincount(minlength=size)[:-1]
        self.importance += flat.bincount(weights, minlength=size)[:-1]
        self.squares += flat.bincount(weights.square(), minlength=size)[:-1]
        self._entropy += float(gate_entropy(gates).sum())
        self._margin += float(gate_margin(gates).sum())
        if self.coactivation is not None:
            self._add_pairs(expert_ids)

    def _add_pairs(self, expert_ids: Tensor) -> None:
        assert self.coactivation is not None
        size = self.num_experts + 1
        for one in range(expert_ids.shape[1]):
            for other in range(one):
                key = expert_ids[:, one] * size + expert_ids[:, other]
                keys, counts = key.unique(return_counts=True)
                first, second = keys // size, keys % size
                is_pair = (first < self.num_experts) & (second < self.num_experts)
                first, second, counts = first[is_pair], second[is_pair], counts[is_pair]
                self.coactivation.index_put_((first, second), counts, accumulate=True)
                self.coactivation.index_put_((second, first), counts, accumulate=True)

    def __iadd__(self, other: ExpertUsage) -> Self:
        """Add the counts of another text."""
        if other.num_experts != self.num_experts:
            raise ValueError(
                f"`other` must have {self.num_experts} experts, but has {other.num_experts}."
            )
        self.num_tokens += other.num_tokens
        for name in ("load", "importance", "squares"):
            getattr(self, name).add_(getattr(other, name))
        if self.coactivation is not None and other.coactivation is not None:
            self.coactivation += other.coactivation
        self._entropy += other._entropy
        self._margin += other._margin
        return self

    @property
    def cv_importance(self) -> float:
        """Return the coefficient of variation of the importance (Table 6)."""
        return self._balance["cv_importance"]

    @property
    def cv_load(self) -> float:
        """Return the coefficient of variation of the load (Table 6)."""
        return self._balance["cv_load"]

    @property
    def max_load(self) -> float:
        """Return the largest load divided by the mean load (Table 6)."""
        return self._balance["max_load"]

    @property
    def idle_experts(self) -> int:
        """Return the number of experts that received no tokens."""
        return int((self.load == 0).sum())

    @property
    def effective_experts(self) -> float:
        """Return the effective number of experts, exp(H), where H is the entropy of the load."""
        return float(effective_experts(self.load.double()))

    @property
    def gate_entropy(self) -> float:
        """Return the mean entropy of a token's gates, in nats."""
        return self._entropy / max(self.num_tokens, 1)

    @property
    def gate_margin(self) -> float:
        """Return the mean difference between a token's two largest gates."""
        return self._margin / max(self.num_tokens, 1)

    @property
    def _balance(self) -> dict[str, float]:
        columns = balance_metrics(self.importance, self.load.double())
        return {name: float(value) for name, value in columns.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the sums and columns as plain values, without the pairs."""
        return {
            "num_tokens": self.num_tokens,
            **self._balance,
            "idle_experts": self.idle_experts,
            "effective_experts": self.effective_experts,
            "gate_entropy": self.gate_entropy,
            "gate_margin": self.gate_margin,
            "load": self.load.tolist(),
            "importance": self.importance.tolist(),
            "squares": self.squares.tolist(),
        }
