"""A beam search that evaluates one hypothesis at a time, and models that are plain functions."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nmt_moe.search import BeamConfig, best_attainable, log_coverage

Model = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
EOS, PAD = 2, 1


def make_model(vocab: int = 11, width: int = 4, seed: int = 1, sharpness: float = 3.0) -> Model:
    """Return a model, which is a function of (R, T) tokens and (R,) sentences.

    The model predicts log-probabilities of the next token, and attention. Both depend on all
    tokens of a row, but not on other rows.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.rand(vocab, 16, generator=generator, dtype=torch.float64)
    output = sharpness * torch.randn(16, vocab, generator=generator, dtype=torch.float64)
    look = 2 * torch.randn(16, width, generator=generator, dtype=torch.float64)

    def model(tokens: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.sin(5.0 * mixing[sentences % vocab])
        for column in tokens.unbind(1):
            hidden = torch.sin(3.0 * hidden + 5.0 * mixing[column])
        log_probs = (hidden @ output).log_softmax(1)
        return log_probs.float(), (hidden @ look).softmax(1).float()

    return model


@dataclass(frozen=True)
class Sentences:
    """A state that holds only each row's sentence."""

    numbers: Tensor

    def reorder(self, rows: Tensor) -> "Sentences":
        return Sentences(self.numbers[rows])


@dataclass
class Stepping:
    """A model wrapped as a `step` function that records the evaluated rows."""

    model: Model
    evaluated: list[set[tuple[int, ...]]] = field(default_factory=list)

    def __call__(self, tokens: Tensor, state: Sentences) -> tuple[Tensor, Tensor, Sentences]:
        rows = torch.cat([state.numbers[:, None], tokens], dim=1).tolist()
        self.evaluated.append(set(map(tuple, rows)))
        assert len(self.evaluated[-1]) == len(rows)
        return *self.model(tokens, state.numbers), state


@dataclass(frozen=True)
class Found:
    tokens: tuple[int, ...]
    score: float
    log_probs: tuple[float, ...]
    attention: Tensor  # (T, S)


def naive_search(
    model: Model, sentence: int, config: BeamConfig, max_length: int, min_length: int = 1
) -> tuple[list[Found], list[set[tuple[int, ...]]]]:
    """Search for one sentence; return the results and the hypotheses evaluated at each step."""
    width, margin = config.beam_size, config.search.beam_prune
    live = [Found((), 0.0, (), torch.zeros(0))]
    ended: list[Found] = []
    evaluated = []
    for length in range(max_length + 1):
        evaluated.append({(sentence, EOS, *one.tokens) for one in live})
        steps = [
            model(torch.tensor([[EOS, *one.tokens]]), torch.tensor([sentence])) for one in live
        ]
        candidates = []
        best = -float("inf")
        for one, (log_probs, attention) in zip(live, steps, strict=True):
            for token, value in enumerate(log_probs[0].tolist()):
                if token == PAD or (token == EOS and length < min_length):
                    continue
                if length == max_length and token != EOS:
                    continue
                best = max(best, value)
                rows = torch.cat([one.attention.view(-1, attention.shape[1]), attention])
                path = (*one.log_probs, value)
                candidates.append(Found((*one.tokens, token), sum(path), path, rows))
        if margin:
            candidates = [one for one in candidates if one.log_probs[-1] >= best - margin]
        candidates.sort(key=lambda one: -one.score)  # scores are still sums of log-probabilities
        new = [final(one, config) for one in candidates[:width] if one.tokens[-1] == EOS]
        top = max((one.score for one in ended + new), default=-float("inf"))
        lowest = top - margin if margin else -float("inf")
        ended += [one for one in new if one.score >= lowest]
        live = [one for one in candidates if one.tokens[-1] != EOS][:width]
        if margin:
            last = config.penalty(max_length + 1)
            bounds = [
                best_attainable(torch.tensor(one.score), config.penalty(length + 2), last)
                for one in live
            ]
            live = [one for one, bound in zip(live, bounds, strict=True) if bound >= lowest]
        if len(ended) >= width or not live:
            break
    kept = [one for one in ended[:width] if one.score >= lowest]
    return sorted(kept, key=lambda one: -one.score), evaluated


def final(one: Found, config: BeamConfig) -> Found:
    """Return a finished hypothesis with its final score."""
    received = one.attention.sum(0, keepdim=True)
    words = torch.ones_like(received, dtype=torch.bool)
    coverage = float(log_coverage(received, words)) * config.search.coverage_penalty_beta
    score = one.score / config.penalty(len(one.tokens)) + coverage
    return Found(one.tokens, score, one.log_probs, one.attention)
