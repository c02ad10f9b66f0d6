"""Gradients of experts that are spread over ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed

from nmt_moe.parallel.groups import ExpertParallelGroup
from nmt_moe.parallel.marks import shard_group


def average_shard_gradients(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of shards, as data parallelism does for other parameters.

    The exchange has already summed them over the tokens of this rank's expert-parallel group. This
    function sums them over replicas as well, and divides them by the total number of ranks. All
    ranks must call it after the last backward pass of an update, with parameters in the same order.

    Args:
        parameters: The model's parameters. Parameters that are not shards are left unchanged.
    """
    for parameter in parameters:
        group = shard_group(parameter)
        if group is None:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(group.world_size)  # divide before the sum, which may overflow float16
        if group.replicas is not None:
            distributed.all_reduce(parameter.grad, group=group.replicas)


def shard_norm(gradients: Iterable[Tensor], group: ExpertParallelGroup) -> Tensor:
    """Compute the norm of the gradients of all experts, including those on other ranks.

    All ranks of the group must call this.

    Args:
        gradients: Gradients of this rank's shards; there must be at least one.
        group: The ranks that together hold every expert once.

    Returns:
        The norm, a scalar in float32 or wider, the same on all ranks.
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
    """Scale all gradients down to the norm `max_norm` if their norm is larger.

    The norm includes the shards of other ranks, so the norm and the scale are the same as in a
    single process with all experts. All ranks must call this after the gradients have been
    averaged.

    Args:
        parameters: Shards and other parameters; parameters without a gradient are skipped.
        max_norm: Largest norm allowed; 0 for no limit.

    Returns:
        The norm before scaling, a scalar.
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
