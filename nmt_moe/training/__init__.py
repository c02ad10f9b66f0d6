"""One update as pure functions."""

from nmt_moe.training.factored_adam import FactoredAdam
from nmt_moe.training.sampled_softmax import ClassSample, draw_classes, sampled_nll
from nmt_moe.training.schedules import warmup_hold_inverse_sqrt

__all__ = [
    "ClassSample",
    "FactoredAdam",
    "draw_classes",
    "sampled_nll",
    "warmup_hold_inverse_sqrt",
]
