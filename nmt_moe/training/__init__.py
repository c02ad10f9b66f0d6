"""One update as pure functions."""

from nmt_moe.training.schedules import warmup_hold_inverse_sqrt

__all__ = ["warmup_hold_inverse_sqrt"]
