"""Optimizers and schedules for fairseq. Importing this package registers them."""

from nmt_moe.optim.factored_adam import FairseqFactoredAdam
from nmt_moe.optim.warmup_hold_inverse_sqrt import WarmupHoldInverseSqrt

__all__ = ["FairseqFactoredAdam", "WarmupHoldInverseSqrt"]
