"""Describe the batch that one device processes at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """The sizes of a batch without padding.

    Attributes:
        sentences: Number of sentences in one device's batch.
        length: Number of tokens in a sentence; for translation, on each side.
        vocab_size: Size of the vocabulary, V.
        num_draws: Number of samples of the sampled softmax; 0 for the full softmax.
        number_bytes: Size of an activation in bytes: 4, or 2 in half precision.
        on_cpu: Whether the device is a CPU. CPUs store dropout masks in the dtype of activations;
            GPUs store the inputs and outputs of experts for each row.
    """

    sentences: int
    length: int
    vocab_size: int
    num_draws: int = 0
    number_bytes: int = 4
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Return the number of tokens on one side."""
        return self.sentences * self.length

    @property
    def dtype(self) -> str:
        """Return the name of torch's dtype for activations."""
        return "float32" if self.number_bytes == 4 else "bfloat16"

    @property
    def distinct_classes(self) -> float:
        """Return the mean number of distinct classes among the samples."""
        return distinct_classes(self.num_draws, self.vocab_size)


def distinct_classes(num_draws: int, vocab_size: int) -> float:
    """Return the mean number of distinct classes among the samples of the sampled softmax.

    Args:
        num_draws: Number of samples.
        vocab_size: Number of classes, V.
    """
    rank = torch.arange(vocab_size, dtype=torch.float64)
    chance = torch.log1p(1 / (rank + 1)) / math.log(vocab_size + 1)
    return float(-torch.expm1(torch.log1p(-chance) * num_draws).sum())
