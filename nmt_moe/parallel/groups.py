"""Expert-parallel groups: the ranks that together hold every expert once."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed

from nmt_moe.checks import check_divides, check_range


@dataclass(frozen=True)
class ExpertParallelGroup:
    """The ranks that together hold every expert once, as seen by one of these ranks.

    With E experts and P ranks per group, ranks [g P, (g + 1) P) of the world form expert-parallel
    group g, and rank p of each group holds experts [p L, (p + 1) L), where L = E / P. Ranks with
    the same p in different groups are replicas: they hold the same experts and average their
    gradients.

    Attributes:
        size: Number of ranks in the group, P; 1 if every rank holds all experts.
        rank: Number of this rank within its group, from 0 to P - 1.
        num_replicas: Number of expert-parallel groups in the world.
        members: torch's process group of the P ranks; None if P is 1.
        replicas: torch's process group of the ranks with the same experts; None if there is only
            one expert-parallel group.

    Source: Shazeer et al. 2017, section 3.1.
    """

    size: int = 1
    rank: int = 0
    num_replicas: int = 1
    members: Any = None
    replicas: Any = None

    @property
    def world_size(self) -> int:
        """Return the number of ranks in all groups together."""
        return self.size * self.num_replicas

    def owned(self, num_experts: int) -> slice:
        """Return the slice of the expert ids, 0 to `num_experts` - 1, that this rank holds."""
        share = num_experts // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


# The expert-parallel group of a layer whose experts are all on this rank.
ALONE = ExpertParallelGroup()


def make_expert_parallel_group(
    num_experts: int, num_groups: int = 0, size: int = 0
) -> ExpertParallelGroup:
    """Spread experts over the ranks of the default process group.

    All ranks must call this with the same arguments. Without a process group, there is a single
    rank.

    Args:
        num_experts: Number of experts, E.
        num_groups: Number of groups of a hierarchical gate, G; 0 for a flat gate. A group is never
            split between ranks.
        size: Number of ranks in an expert-parallel group, P. It must divide the number of ranks and
            E (with a hierarchical gate, G). 0 stands for the largest such number.

    Returns:
        This rank's expert-parallel group.

    Raises:
        ValueError: if P does not divide both numbers.
    """
    check_range("expert_parallel_size", size, 0)
    is_started = distributed.is_available() and distributed.is_initialized()
    world_size = distributed.get_world_size() if is_started else 1
    divided = num_groups or num_experts
    size = size or math.gcd(world_size, divided)
    check_divides("distributed_world_size", world_size, "`expert_parallel_size`", size)
    name = "num_groups" if num_groups else "num_experts"
    check_divides(name, divided, "`expert_parallel_size`", size)
    if size == 1:
        return ALONE
    rank, num_replicas = distributed.get_rank(), world_size // size
    if num_replicas == 1:
        return ExpertParallelGroup(size, rank, 1, distributed.group.WORLD)
    # Every rank must take part in creating every process group, including those that it does not
    # belong to.
    members = [
        distributed.new_group(list(range(first, first + size)))
        for first in range(0, world_size, size)
    ]
    replicas = [
        distributed.new_group(list(range(member, world_size, size))) for member in range(size)
    ]
    member = rank % size
    return ExpertParallelGroup(size, member, num_replicas, members[rank // size], replicas[member])


def cut_shard(whole: Tensor, group: ExpertParallelGroup) -> Tensor:
    """Return a copy of this rank's shard (L, ...) of a tensor (E, ...) with all experts."""
    return whole[group.owned(len(whole))].clone()
