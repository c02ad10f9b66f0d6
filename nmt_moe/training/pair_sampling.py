"""Determine how often training on many language pairs uses each pair."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nmt_moe.checks import check_range


def passes_per_epoch(
    sizes: Mapping[str, int],
    temperature: float = 1.0,
    oversampling: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Compute the number of passes over each pair's sentences in an epoch.

    An epoch has N sentences. A pair with n of the N sentences gets a share of the epoch in
    proportion to (n / N)^(1 / T). At T = 1, there is one pass over each pair. At larger T, there is
    more than one pass over rare pairs and less than one over frequent pairs. As T grows, the shares
    become equal.

    Args:
        sizes: Number of sentences of each pair, at least 1.
        temperature: T, at least 1.
        oversampling: Number of passes over some pairs, to use instead of the number that the
            temperature implies.

    Returns:
        The number of passes over each pair, in the order of `sizes`.

    Raises:
        ValueError: if a pair is unknown or a number is out of range; the message says which.
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
                f"`oversampling`: a pair must be one of {', '.join(sizes)}, but is '{pair}'."
            )
        if not 0 < wanted < float("inf"):
            raise ValueError(
                f"`oversampling` for {pair} must be a finite number greater than 0, "
                f"but is {wanted}."
            )
        passes[pair] = wanted
    return passes


def sentences_per_epoch(size: int, passes: float) -> int:
    """Return how many sentences an epoch draws from a pair of `size` sentences.

    The number is at least 1.
    """
    return max(1, round(size * passes))


def sentences_of_epoch(size: int, passes: float, epoch: int, seed: int) -> Tensor:
    """Draw the sentences of one pair for an epoch.

    Each epoch continues where the previous one ended, in a sequence of random orders of all
    sentences. The numbers of times that two sentences are drawn therefore differ by at most 1 after
    any number of epochs, and any epoch can be drawn without the previous ones.

    Args:
        size: Number of sentences of the pair.
        passes: Number of passes over these sentences in an epoch.
        epoch: The epoch, counted from 1.
        seed: Seed of the random orders.

    Returns:
        (round(size * passes),) int64, from 0 to size - 1, with repetitions if passes > 1.
    """
    count = sentences_per_epoch(size, passes)
    start = (epoch - 1) * count
    first, last = start // size, (start + count - 1) // size
    orders = [random_order(size, number, seed) for number in range(first, last + 1)]
    return torch.cat(orders)[start - first * size :][:count]


def random_order(size: int, number: int, seed: int) -> Tensor:
    """Return the `number`-th random order of `size` items: (size,) int64."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(size, generator=generator)
