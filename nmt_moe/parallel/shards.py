"""Parameters of which each rank holds the slice of its own experts."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from nmt_moe.parallel.groups import ExpertParallelGroup


def mark_shard(parameter: nn.Parameter, group: ExpertParallelGroup) -> None:
    """Mark a parameter (L, ...) as this rank's slice of one (E, ...)."""
    parameter.expert_group = group  # type: ignore[attr-defined]
    # fairseq's own mark: neither summed over ranks nor part of its gradient norm, and counted
    # apart in its log.
    parameter.expert = True  # type: ignore[attr-defined]


def shard_group(parameter: Tensor) -> ExpertParallelGroup | None:
    """Return the group that a parameter is spread over; None if this rank holds all of it."""
    return getattr(parameter, "expert_group", None)


def init_uniform(parameter: nn.Parameter, bound: float) -> None:
    """Draw a parameter uniformly within `bound`.

    Of a shard, the whole parameter is drawn and this rank's slice kept, so that on the CPU equal
    seeds give equal experts, and equal draws after them, on any number of ranks. It takes the
    memory of one slice more.
    """
    group = shard_group(parameter)
    if group is None:
        nn.init.uniform_(parameter, -bound, bound)
        return
    foreign = torch.empty_like(parameter)
    for rank in range(group.size):
        nn.init.uniform_(parameter if rank == group.rank else foreign, -bound, bound)


def cut_shard(whole: Tensor, group: ExpertParallelGroup) -> Tensor:
    """Return this rank's slice (L, ...) of a tensor (E, ...) of all experts."""
    return whole[group.owned(len(whole))].clone()


def average_shard_gradients(parameters: Iterable[Tensor]) -> None:
    """Give the gradients of shards the scale that data parallelism gives those of the others.

    The exchange has already summed them over the tokens of this rank's group; what is left is the
    sum over replicas, and the division by the number of all ranks. All ranks must call, after
    the last backward pass of an update, with parameters in the same order.

    Args:
        parameters: Those that are no shards are left alone.
    """
    for parameter in parameters:
        group = shard_group(parameter)
        if group is None:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(group.world_size)  # first, or float16 may overflow
        if group.replicas is not None:
            distributed.all_reduce(parameter.grad, group=group.replicas)


def shard_norm(gradients: Iterable[Tensor], group: ExpertParallelGroup) -> Tensor:
    """Compute the norm of the gradients of all experts, whichever rank holds them.

    All ranks of the group must call.

    Args:
        gradients: Of this rank's shards; at least one.
        group: The ranks.

    Returns:
        A scalar, float32 or wider, equal on all ranks.
    """
    norms = [
        torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        for grad in gradients
    ]
    square = torch.stack(norms).square().sum()
    distributed.all_reduce(square, group=group.members)
    return square.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients down, if their norm is larger than `max_norm`, to that norm.

    Shards count with those of the other ranks, so the norm and the scale are those of one process
    with all experts. All ranks must call, once gradients are averaged.

    Args:
        parameters: Dense ones and shards; those without a gradient are left alone.
        max_norm: 0 for no limit.

    Returns:
        A scalar, the norm before.
    """
    groups, dense, shards = [], [], []
    for parameter in parameters:
        group, grad = shard_group(parameter), parameter.grad
        if grad is None:
            continue
        if group is None:
            dense.append(grad)
        else:
            groups.append(group)
            shards.append(grad)
    norm = torch.nn.utils.get_total_norm(dense)
    if shards:
        norm = torch.hypot(norm, shard_norm(shards, groups[0]).to(norm))
    if max_norm > 0:
        torch._foreach_mul_([*dense, *shards], (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm
