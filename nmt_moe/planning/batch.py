"""What one device reads at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """The sizes of a batch without padding.

    Attributes:
        sentences: Of one batch of one device.
        length: Tokens of a sentence; of a translation, on each side.
        vocab_size: V.
        num_draws: Draws of the sampled softmax; 0 for the full one.
        number_bytes: Of an activation: 4, or 2 of half precision.
        on_cpu: CPUs keep masks of dropout as numbers, GPUs rows of experts twice.
    """

    sentences: int
    length: int
    vocab_size: int
    num_draws: int = 0
    number_bytes: int = 4
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Of one side."""
        return self.sentences * self.length

    @property
    def dtype(self) -> str:
        """Name of torch's type of activations."""
        return "float32" if self.number_bytes == 4 else "bfloat16"

    @property
    def distinct_classes(self) -> float:
        """Mean number of different classes among the draws."""
        return distinct_classes(self.num_draws, self.vocab_size)


def distinct_classes(num_draws: int, vocab_size: int) -> float:
    """Return the mean number of different classes among draws of the sampled softmax."""
    rank = torch.arange(vocab_size, dtype=torch.float64)
    chance = torch.log1p(1 / (rank + 1)) / math.log(vocab_size + 1)
    return float(-torch.expm1(torch.log1p(-chance) * num_draws).sum())
