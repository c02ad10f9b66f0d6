"""Translate with the networks used in training, which share no code with those in a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from nmt_moe.search import BeamConfig, Hypothesis, Restrictions, beam_search

EOS, PAD, UNK = 2, 1, 3


@dataclass(frozen=True)
class _Source:
    """The state between steps, which holds only the sentence of every row."""

    tokens: list[int]

    def reorder(self, rows: Tensor) -> Self:
        return self


def predict(networks: dict[str, nn.Module], source: list[int], read: Tensor) -> tuple[Any, Any]:
    """Return (R, T, V) log-probabilities and (R, T, S) attention for (R, T) target tokens."""
    tokens = torch.tensor([source]).expand(len(read), -1)
    encoded = networks["encoder"](tokens, torch.zeros_like(tokens, dtype=torch.bool))
    out = networks["decoder"](read, encoded)
    return networks["output"](out.features).log_softmax(dim=2), out.attention


@torch.no_grad()
def mean_prediction(
    models: Sequence[dict[str, nn.Module]], source: list[int], read: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logs of the mean probabilities, and the mean attention, of an ensemble."""
    results = [predict(networks, source, read) for networks in models]
    probs = torch.stack([log_probs.exp() for log_probs, _ in results]).mean(dim=0)
    return probs.log(), torch.stack([attention for _, attention in results]).mean(dim=0)


def translate(
    models: Sequence[dict[str, nn.Module]], source: list[int], config: BeamConfig, max_length: int
) -> list[Hypothesis]:
    """Search for translations of one sentence, computing every step from the start.

    Args:
        models: One model, or an ensemble.
        source: The numbers of the tokens, including the end mark.
        config: The settings of the search.
        max_length: The maximum number of tokens before the end mark.
    """

    def step(tokens: Tensor, state: _Source) -> tuple[Tensor, Tensor, _Source]:
        log_probs, attention = mean_prediction(models, state.tokens, tokens)
        return log_probs[:, -1], attention[:, -1], state

    restrictions = Restrictions(eos=EOS, pad=PAD, max_lengths=torch.tensor([max_length]), unk=UNK)
    words = torch.tensor([[True] * (len(source) - 1) + [False]])
    start = torch.tensor([EOS])
    return beam_search(step, _Source(source), start, config, restrictions, words)[0]
