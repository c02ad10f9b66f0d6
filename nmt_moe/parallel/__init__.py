"""What needs other ranks: the only folder that may call collectives."""

from nmt_moe.parallel.reduction import sum_over_ranks

__all__ = ["sum_over_ranks"]
