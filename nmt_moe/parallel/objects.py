"""Exchange small Python objects between ranks."""

from typing import Any

from torch import distributed

from nmt_moe.parallel.groups import ExpertParallelGroup


def is_first_replica(group: ExpertParallelGroup) -> bool:
    """Return whether no lower rank of the world holds the same experts as this one."""
    return distributed.get_rank() < group.size


def from_first_rank(value: Any, group: ExpertParallelGroup) -> Any:
    """Return the value passed by the group's first rank. All ranks of the group must call this."""
    values = [value]
    first = distributed.get_global_rank(group.members, 0)
    distributed.broadcast_object_list(values, src=first, group=group.members)
    return values[0]


def gather_from_ranks(value: Any, group: ExpertParallelGroup) -> list[Any]:
    """Return the values passed by the group's ranks. All ranks of the group must call this."""
    values: list[Any] = [None] * group.size
    distributed.all_gather_object(values, value, group=group.members)
    return values
