"""Find features for which experts are used more often than by chance.

Among the N tokens of a text, n have a feature (a piece or a class), m were sent to an expert, and k
have the feature and were sent to the expert. By chance, the expert would get a share m / N of the
tokens with the feature. The lift is (k / n) / (m / N). Its lower bound is

    Wilson's lower bound of k / n  /  Wilson's upper bound of m / N,

where each bound has the one-sided level 0.05 / (2 M) for M comparisons in the layer (Bonferroni).
If tokens were independent, all lower bounds of a layer would hold together with a probability of
95 %. Features with a lower bound above 1 are listed, sorted by that bound. If an expert is rarely
used, its shares are uncertain, so a few tokens do not make it a specialist.

Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.05
# Features and uses that occur less often than this are not compared.
MIN_COUNT = 5


def wilson_interval(count: int, total: int, z: float) -> tuple[float, float]:
    """Return Wilson's interval for a share, z standard deviations on each side."""
    if total == 0:
        return 0.0, 1.0
    share, square = count / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    half /= 1 + square / total
    return max(0.0, middle - half), min(1.0, middle + half)


class FeatureCounts:
    """The number of times that each expert was used for each feature."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.names: list[str] = []
        self.totals: Counter[int] = Counter()
        self.uses: Counter[int] = Counter()  # key: feature * E + expert
        self._numbers: dict[str, int] = {}

    def add(self, features: Sequence[Iterable[str]], expert_ids: Tensor) -> None:
        """Add a batch of tokens.

        Args:
            features: The features of each of N tokens.
            expert_ids: (N, K) int64, the chosen experts; E in empty slots.
        """
        rows, numbers = [], []
        for row, names in enumerate(features):
            for name in names:
                rows.append(row)
                numbers.append(self._number(name))
        if not rows:
            return
        self.totals.update(numbers)
        experts = expert_ids[torch.tensor(rows)]
        keys = torch.tensor(numbers).unsqueeze(1) * self.num_experts + experts
        found, counts = keys[experts < self.num_experts].unique(return_counts=True)
        self.uses.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def _number(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self.names)
            self.names.append(name)
        return number

    def grouped(self, group_of: Callable[[int], str]) -> FeatureCounts:
        """Return counts for groups of features; `group_of` maps a feature's count to its group."""
        result = FeatureCounts(self.num_experts)
        groups = {n: result._number(group_of(total)) for n, total in self.totals.items()}
        for number, total in self.totals.items():
            result.totals[groups[number]] += total
        for key, count in self.uses.items():
            number, expert = divmod(key, self.num_experts)
            result.uses[groups[number] * self.num_experts + expert] += count
        return result

    @property
    def num_features(self) -> int:
        """Return the number of features frequent enough to be compared."""
        return sum(total >= MIN_COUNT for total in self.totals.values())


def find_overuse(
    counts: FeatureCounts, load: Sequence[int], num_tokens: int, num_comparisons: int, most: int
) -> dict[int, list[dict[str, Any]]]:
    """Return the features for which each expert is over-used, largest lower bound first.

    Args:
        counts: Counts of features.
        load: Number of tokens sent to each of the E experts.
        num_tokens: Number of tokens, N.
        num_comparisons: Number of comparisons, M, over all features of the layer.
        most: Maximum number of features per expert.

    Returns:
        For each expert, rows of `feature`, `uses` (k), `count` (n), `lift`, and its bounds `low`
        and `high`.
    """
    z = NormalDist().inv_cdf(1 - LEVEL / (2 * max(num_comparisons, 1)))
    shares = {m: wilson_interval(m, num_tokens, z) for m in set(load)}
    found: dict[int, list[dict[str, Any]]] = {}
    for key, uses in counts.uses.items():
        number, expert = divmod(key, counts.num_experts)
        count = counts.totals[number]
        if uses < MIN_COUNT:
            continue
        lowest, highest = shares[load[expert]]
        low, high = wilson_interval(uses, count, z)
        if low <= highest:
            continue
        row = {
            "feature": counts.names[number],
            "uses": uses,
            "count": count,
            "lift": (uses / count) / (load[expert] / num_tokens),
            "low": low / highest,
            "high": high / max(lowest, 1 / (1000 * num_tokens)),
        }
        found.setdefault(expert, []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: (-row["low"], row["feature"]))
        del rows[most:]
    return found
