"""Find experts that are used together, and measure how much two texts' use of experts overlaps."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from nmt_moe.inspection.overuse import LEVEL, MIN_COUNT, wilson_interval
from nmt_moe.inspection.usage import ExpertUsage

# Number of rounds of iterative proportional fitting. A few experts that are always used together
# need the most rounds.
ROUNDS = 500


def expected_pairs(coactivation: Tensor) -> Tensor:
    """Compute the expected count of each pair if experts with the same loads met by chance.

    A token's experts differ from each other, so chance means quasi-independence: the expected
    count is a_i a_j off the diagonal, with factors a chosen so that each expert is in as many pairs
    as observed.

    Args:
        coactivation: (E, E) int64, symmetric with 0 on the diagonal.

    Returns:
        (E, E) float64, the expected number of tokens that both experts receive.

    Source: Goodman 1968, The analysis of cross-classified data.
    """
    wanted = coactivation.sum(1).double()
    total = wanted.sum().clamp_min(1)
    factors = wanted / total.sqrt()
    for _ in range(ROUNDS):
        others = factors.sum() - factors
        factors = (factors * wanted / others.clamp_min(1e-12)).sqrt()
    expected = factors.unsqueeze(1) * factors
    return expected.fill_diagonal_(0)


def compare_pairs(usage: ExpertUsage, most: int) -> dict[str, Any] | None:
    """Return the pairs of experts most over- and under-represented compared with chance.

    Args:
        usage: The usage of a layer.
        most: Maximum number of pairs in each list.

    Returns:
        The number of pairs compared, `num_pairs`, and the lists `over` and `under` with rows of
        `experts`, `count`, `expected`, `lift`, and the bounds `low` and `high` of the lift. These
        are Wilson's bounds for the count's share of tokens, corrected for all pairs (Bonferroni),
        divided by the expected share. The result is None if pairs were not counted or if there are
        none.
    """
    counts = usage.coactivation
    if counts is None or not counts.any():
        return None
    expected = expected_pairs(counts)
    rows, columns = torch.triu_indices(len(counts), len(counts), offset=1)
    is_tested = expected[rows, columns] >= MIN_COUNT
    rows, columns = rows[is_tested], columns[is_tested]
    num_pairs = len(rows)
    z = NormalDist().inv_cdf(1 - LEVEL / (2 * max(num_pairs, 1)))
    lift = counts[rows, columns] / expected[rows, columns]
    order = lift.argsort(descending=True, stable=True).tolist()
    lists: dict[str, Any] = {"num_pairs": num_pairs, "over": [], "under": []}
    for name, numbers in (("over", order), ("under", order[::-1])):
        for number in numbers[: 50 * most]:
            one, other = int(rows[number]), int(columns[number])
            count, chance = int(counts[one, other]), float(expected[one, other])
            bounds = wilson_interval(count, usage.num_tokens, z)
            low, high = (bound * usage.num_tokens / chance for bound in bounds)
            if (low > 1) if name == "over" else (high < 1):
                row = {"experts": [one, other], "count": count, "expected": chance}
                lists[name].append({**row, "lift": count / chance, "low": low, "high": high})
    lists["over"].sort(key=lambda row: -row["low"])
    lists["under"].sort(key=lambda row: row["high"])
    lists["over"], lists["under"] = lists["over"][:most], lists["under"][:most]
    return lists


def load_overlap(one: ExpertUsage, other: ExpertUsage) -> float:
    """Compute how much two texts' use of a layer's experts overlaps.

    Returns:
        The sum of each expert's smaller share of the load in the two texts. It is 1 if all shares
        are equal, and 0 if no expert is used by both texts.
    """
    shares = [usage.load.double() / usage.load.sum().clamp_min(1) for usage in (one, other)]
    return float(torch.minimum(*shares).sum())
