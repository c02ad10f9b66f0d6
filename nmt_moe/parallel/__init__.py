"""What concerns several ranks: the only folder that may call collectives."""

from nmt_moe.parallel.exchange import Route, plan_route
from nmt_moe.parallel.gradients import is_expert, mark_expert
from nmt_moe.parallel.groups import ALONE, ExpertParallelGroup, make_expert_parallel_group
from nmt_moe.parallel.objects import from_first_rank, gather_from_ranks, is_first_replica
from nmt_moe.parallel.reduction import ring_bytes, sum_over_ranks
from nmt_moe.parallel.shards import (
    average_shard_gradients,
    clip_gradients,
    cut_shard,
    init_uniform,
    mark_shard,
    shard_group,
    shard_norm,
)

__all__ = [
    "ALONE",
    "ExpertParallelGroup",
    "Route",
    "average_shard_gradients",
    "clip_gradients",
    "cut_shard",
    "from_first_rank",
    "gather_from_ranks",
    "init_uniform",
    "is_expert",
    "is_first_replica",
    "make_expert_parallel_group",
    "mark_expert",
    "mark_shard",
    "plan_route",
    "ring_bytes",
    "shard_group",
    "shard_norm",
    "sum_over_ranks",
]
