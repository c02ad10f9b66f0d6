"""What concerns several ranks: the only folder that may call collectives."""

from nmt_moe.parallel.gradients import is_expert, mark_expert
from nmt_moe.parallel.reduction import sum_over_ranks

__all__ = ["is_expert", "mark_expert", "sum_over_ranks"]
