"""How often a model of many language pairs sees each of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nmt_moe.checks import check_range


def passes_per_epoch(
    sizes: Mapping[str, int],
    temperature: float = 1.0,
    oversampling: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Compute how many times an epoch goes through each pair's sentences.

    A pair of n of all N sentences gets a share of an epoch in proportion to (n / N)^(1 / T), and an
    epoch keeps its N sentences: at T = 1 each pair is passed once; at larger T rare pairs more than
    once and frequent ones less; as T grows all get equal shares.

    Args:
        sizes: Sentences of each pair, 1 at least.
        temperature: T, at least 1.
        oversampling: Passes of some pairs, which for them replace what the temperature gives.

    Returns:
        Passes of each pair, in the order of `sizes`.

    Raises:
        ValueError: naming the pair or the value.
    """
    check_range("sampling_temperature", temperature, 1.0)
    for pair, size in sizes.items():
        check_range(f"sentences of {pair}", size, 1)
    total = sum(sizes.values())
    weights = {pair: (size / total) ** (1 / temperature) for pair, size in sizes.items()}
    whole = sum(weights.values())
    passes = {pair: total * weights[pair] / whole / size for pair, size in sizes.items()}
    for pair, wanted in (oversampling or {}).items():
        if pair not in passes:
            raise ValueError(
                f"`oversampling` must name pairs of {', '.join(sizes)}, but names '{pair}'."
            )
        if not 0 < wanted < float("inf"):
            raise ValueError(f"`oversampling` of {pair} must be greater than 0, but is {wanted}.")
        passes[pair] = wanted
    return passes


def sentences_per_epoch(size: int, passes: float) -> int:
    """Return how many sentences an epoch takes of a pair that has `size`, 1 at least."""
    return max(1, round(size * passes))


def sentences_of_epoch(size: int, passes: float, epoch: int, seed: int) -> Tensor:
    """Draw the sentences of one pair that an epoch takes.

    Epochs go on where the last one ended, through one random order of all sentences after another.
    So no sentence is drawn more than once more often than another, however many epochs there are,
    and any epoch can be drawn without those before it.

    Args:
        size: Sentences of the pair.
        passes: How often an epoch goes through them.
        epoch: Counted from 1.
        seed: Other seeds give other orders.

    Returns:
        (round(size * passes),) int64, from 0 to size - 1, with repetitions if passes > 1.
    """
    count = sentences_per_epoch(size, passes)
    start = (epoch - 1) * count
    first, last = start // size, (start + count - 1) // size
    orders = [random_order(size, number, seed) for number in range(first, last + 1)]
    return torch.cat(orders)[start - first * size :][:count]


def random_order(size: int, number: int, seed: int) -> Tensor:
    """Give the `number`-th of the random orders of `size` things; (size,) int64."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(size, generator=generator)
