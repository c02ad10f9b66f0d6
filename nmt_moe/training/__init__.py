"""Parts of training: sampled losses, factored Adam, learning rates and sampling of pairs."""

from nmt_moe.training.factored_adam import FactoredAdam
from nmt_moe.training.pair_sampling import (
    passes_per_epoch,
    sentences_of_epoch,
    sentences_per_epoch,
)
from nmt_moe.training.sampled_softmax import ClassSample, draw_classes, sampled_nll
from nmt_moe.training.schedules import warmup_hold_inverse_sqrt

__all__ = [
    "ClassSample",
    "FactoredAdam",
    "draw_classes",
    "passes_per_epoch",
    "sampled_nll",
    "sentences_of_epoch",
    "sentences_per_epoch",
    "warmup_hold_inverse_sqrt",
]
