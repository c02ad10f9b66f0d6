"""Score all translations of a sentence up to a given length, to test beam searches."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.models import make_dictionary, make_task, make_tokens

LETTERS = "abc"
LONGEST = 3
# These unused words enlarge the dictionary, because its size limits fairseq's beam.
FILLERS = "".join(chr(0x4E00 + number) for number in range(45))
UNUSED = ["<s>", *FILLERS]
# This beam has room for all 3 + 9 + 27 finished translations, and for all unfinished ones.
BEAM = 40
DICTIONARY = make_dictionary(LETTERS + FILLERS)


def wide_task() -> Any:
    """Return a task with a target dictionary of `LETTERS` and `FILLERS`."""
    return make_task(target=LETTERS + FILLERS)


@dataclass(frozen=True)
class Translation:
    """One translation with the end mark.

    Attributes:
        text: The letters.
        log_probs: (T,) log-probabilities of the tokens, including the end mark.
        received: (S,) attention that each source word received, without the end mark.
    """

    text: str
    log_probs: Tensor
    received: Tensor

    def score(self, alpha: float, beta: float) -> float:
        """Compute GNMT's score in plain numbers."""
        coverage = sum(math.log(min(max(one, 1e-6), 1.0)) for one in self.received.tolist())
        length = len(self.text) + 1
        return float(self.log_probs.sum()) / ((5 + length) / 6) ** alpha + beta * coverage


@torch.no_grad()
def force(models: Sequence[Any], source: str, text: str) -> Translation:
    """Score all steps of a given translation in one pass with the models' mean probabilities."""
    src_tokens, src_lengths = make_tokens(source)
    target = [DICTIONARY.index(letter) for letter in text] + [DICTIONARY.eos()]
    previous = torch.tensor([[DICTIONARY.eos(), *target[:-1]]])
    outputs = [model(src_tokens, src_lengths, previous) for model in models]
    all_probs = [
        model.get_normalized_probs(output, log_probs=False)
        for model, output in zip(models, outputs, strict=True)
    ]
    probs = torch.stack(all_probs).mean(0)[0]  # (T, V)
    attention = torch.stack([output[1]["attn"][0] for output in outputs]).mean(0)[0]  # (T, S)
    log_probs = probs[torch.arange(len(target)), target].log()
    return Translation(text, log_probs, attention.sum(0)[:-1])


def enumerate_translations(models: Sequence[Any], source: str) -> list[Translation]:
    """Score every string of `LETTERS` of length 1 to `LONGEST`."""
    lengths = range(1, LONGEST + 1)
    texts = ["".join(t) for length in lengths for t in itertools.product(LETTERS, repeat=length)]
    return [force(models, source, text) for text in texts]


def prune(translations: Sequence[Translation], margin: float, alpha: float) -> list[Translation]:
    """Apply both kinds of pruning by their definitions, with an unlimited beam."""
    kept = list(translations)
    for step in range(LONGEST + 1):
        # At this step, unfinished hypotheses with the same prefix have the same log-probability.
        local = [one.log_probs[step] for one in kept if len(one.text) >= step]
        best = max(local)
        kept = [one for one in kept if len(one.text) < step or one.log_probs[step] >= best - margin]
    best_score = max(one.score(alpha, 0.0) for one in kept)
    return [one for one in kept if one.score(alpha, 0.0) >= best_score - margin]
