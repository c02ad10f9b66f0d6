"""Sums over the batches of all ranks."""

import torch
from torch import Tensor, distributed

from nmt_moe.parallel.traffic import BALANCE, ring_bytes, sending


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, with a gradient: every rank's own share of the sum's.

    All ranks of the default process group must call, and go backward through it, the same number of
    times. Without a process group, or with one rank, the tensor comes back as it is.

    Args:
        values: Of the same shape on all ranks.

    Returns:
        The sum, equal on all ranks. What reaches `values` in the backward pass is the sum over
        ranks of the gradients of the result.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return values
    if distributed.get_world_size() == 1:
        return values
    # Imported here: it is absent from builds of torch without torch.distributed.
    from torch.distributed.nn.functional import all_reduce

    num_bytes = ring_bytes(values.nbytes, distributed.get_world_size())
    with sending(BALANCE, num_bytes, values.device):
        total = all_reduce(values)
    if total.requires_grad:
        total.register_hook(lambda _: _count_backward(num_bytes, values.device))
    return total


def _count_backward(num_bytes: int, device: torch.device) -> None:
    with sending(BALANCE, num_bytes, device):  # its time is not known here
        pass
