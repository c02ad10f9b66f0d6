"""Communication between ranks. No other package calls collectives."""

from nmt_moe.parallel.exchange import Exchange, Route, make_exchange
from nmt_moe.parallel.gradients import average_shard_gradients, clip_gradients, shard_norm
from nmt_moe.parallel.groups import (
    ALONE,
    ExpertParallelGroup,
    cut_shard,
    make_expert_parallel_group,
)
from nmt_moe.parallel.marks import is_expert, is_shard, mark_expert, shard_group
from nmt_moe.parallel.objects import from_first_rank, gather_from_ranks, is_first_replica
from nmt_moe.parallel.reduction import ring_bytes, sum_over_ranks

__all__ = [
    "ALONE",
    "Exchange",
    "ExpertParallelGroup",
    "Route",
    "average_shard_gradients",
    "clip_gradients",
    "cut_shard",
    "from_first_rank",
    "gather_from_ranks",
    "is_expert",
    "is_first_replica",
    "is_shard",
    "make_exchange",
    "make_expert_parallel_group",
    "mark_expert",
    "ring_bytes",
    "shard_group",
    "shard_norm",
    "sum_over_ranks",
]
