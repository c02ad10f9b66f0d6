"""Rows travel to the ranks that own their experts, and answers back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from nmt_moe.parallel.groups import ExpertParallelGroup


@dataclass(frozen=True)
class Route:
    """How many rows go where; made once for each pass through a layer.

    Attributes:
        send_counts: P numbers, the rows this rank sends to each rank of its group.
        recv_counts: P numbers, the rows it receives from each.
        num_slots: The largest K of all ranks of the group.
        all_done: Whether all ranks of the group said that they are done.
        group: The ranks.
    """

    send_counts: list[int]
    recv_counts: list[int]
    num_slots: int
    all_done: bool
    group: ExpertParallelGroup

    def to_owners(self, rows: Tensor) -> Tensor:
        """Send rows, sorted by destination, to the owners; differentiable.

        All ranks of the group must call, and go backward, in the same order.

        Args:
            rows: (sum of `send_counts`, ...).

        Returns:
            (sum of `recv_counts`, ...), sorted by sender, in each sender's order.
        """
        return _AllToAll.apply(rows, self.send_counts, self.recv_counts, self.group.members)

    def to_senders(self, rows: Tensor) -> Tensor:
        """Send answers, in the order in which `to_owners` gave the rows, back; differentiable."""
        return _AllToAll.apply(rows, self.recv_counts, self.send_counts, self.group.members)


def plan_route(
    send_counts: Tensor, num_slots: int, group: ExpertParallelGroup, is_done: bool = False
) -> Route:
    """Tell every rank of the group how many rows it will receive.

    All ranks of the group must call, with or without rows.

    Args:
        send_counts: (P,) int64.
        num_slots: K. Gates that give each token as many experts as they like may have another on
            each rank.
        group: The ranks.
        is_done: This rank has no tokens of its own any more, and takes part for the others' sake.

    Returns:
        The route.
    """
    columns = [torch.full_like(send_counts, number) for number in (num_slots, is_done)]
    sent = torch.stack([send_counts, *columns], dim=1)
    received = torch.empty_like(sent)
    ones = [1] * group.size
    _exchange(received, sent, ones, ones, group.members)
    recv_counts, all_slots, all_done = received.t().tolist()
    return Route(send_counts.tolist(), recv_counts, max(all_slots), all(all_done), group)


class _AllToAll(torch.autograd.Function):
    """Its backward pass is called also where there is not a single row, as peers wait for it."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_counts: list[int], recv_counts: list[int], members: Any
    ) -> Tensor:
        ctx.send_counts, ctx.recv_counts, ctx.members = send_counts, recv_counts, members
        return _send(rows, send_counts, recv_counts, members)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
        return _send(grad_rows, ctx.recv_counts, ctx.send_counts, ctx.members), None, None, None


def _send(rows: Tensor, send_counts: list[int], recv_counts: list[int], members: Any) -> Tensor:
    received = rows.new_empty(sum(recv_counts), *rows.shape[1:])
    _exchange(received, rows.contiguous(), recv_counts, send_counts, members)
    return received


def _exchange(
    received: Tensor, sent: Tensor, recv_counts: list[int], send_counts: list[int], members: Any
) -> None:
    distributed.all_to_all_single(received, sent, recv_counts, send_counts, group=members)
