"""One update as pure functions."""

from nmt_moe.training.factored_adam import FactoredAdam
from nmt_moe.training.schedules import warmup_hold_inverse_sqrt

__all__ = ["FactoredAdam", "warmup_hold_inverse_sqrt"]
