"""Send tokens to the ranks that hold their experts, and send the weighted sums back."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nmt_moe.kernels import RowPlan, combine_rows, gather_rows, plan_rows
from nmt_moe.parallel.groups import ExpertParallelGroup


class Arrivals(NamedTuple):
    """Tokens that this rank received for its experts.

    Attributes:
        x: (M, D), the tokens' vectors.
        gates: (M, K), weights of the chosen experts, in the dtype that was sent; 0 in empty slots.
        expert_ids: (M, K) int64, the chosen experts, counted from this rank's first expert; L in an
            empty slot.
        num_rows: Number of slots that are not empty; None if unknown.
    """

    x: Tensor
    gates: Tensor
    expert_ids: Tensor
    num_rows: int | None


@dataclass(frozen=True)
class LocalRoute:
    """The route for a rank that holds all experts, so that tokens stay where they are."""

    expert_ids: Tensor
    num_rows: int | None
    all_done: bool

    def to_experts(self, x: Tensor, gates: Tensor) -> Arrivals:
        """Send tokens, (N, D), with their gates, (N, K), to the ranks of their experts."""
        return Arrivals(x, gates, self.expert_ids, self.num_rows)

    def to_tokens(self, y: Tensor) -> Tensor:
        """Send the weighted sums, (M, D), back, and add them up for each token, (N, D)."""
        return y


class LocalExchange:
    """The exchange of a rank that holds all experts. It sends nothing."""

    def route(
        self, expert_ids: Tensor, num_rows: int | None = None, is_done: bool = False
    ) -> LocalRoute:
        """Determine which tokens go to which rank.

        All ranks of the expert-parallel group must call this.

        Args:
            expert_ids: (N, K) int64, the chosen experts; E in an empty slot.
            num_rows: Number of slots that are not empty; None if unknown.
            is_done: Whether this rank has no tokens left and only computes for other ranks.
        """
        return LocalRoute(expert_ids, num_rows, is_done)


@dataclass(frozen=True)
class AllToAllRoute:
    """A plan of the tokens that ranks send to each other.

    All ranks of the expert-parallel group must call each method, and run its backward pass, in the
    same order.

    Attributes:
        plan: Row plan with this rank's tokens sorted by destination rank. A token has one row for
            each of its destinations.
        expert_ids: (N, K) int64, global ids of the chosen experts; E in an empty slot. K is the
            largest number of slots on any rank.
        send_counts: Number of tokens that this rank sends to each of the P ranks.
        recv_counts: Number of tokens that this rank receives from each of the P ranks.
        all_done: Whether all P ranks are done.
        owned: Slice of the global ids of this rank's experts.
        members: torch's process group of the P ranks.
    """

    plan: RowPlan
    expert_ids: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    all_done: bool
    owned: slice
    members: Any

    def to_experts(self, x: Tensor, gates: Tensor) -> Arrivals:
        """Send each token once to each rank that holds any of its experts."""
        gates = F.pad(gates, (0, self.expert_ids.shape[1] - gates.shape[1]))
        x, gates = self._send_both(x, gates)
        ids = self._send(self.expert_ids.index_select(0, self.plan.row_token).int()).long()
        is_here = (ids >= self.owned.start) & (ids < self.owned.stop)
        local_ids = torch.where(is_here, ids - self.owned.start, self.owned.stop - self.owned.start)
        # Waiting here costs little, because the host has already waited for the route's counts.
        num_rows = int(is_here.sum())
        return Arrivals(x, gates.masked_fill(~is_here, 0.0), local_ids, num_rows)

    def to_tokens(self, y: Tensor) -> Tensor:
        """Send the weighted sums back to the ranks of their tokens, and add them up there."""
        rows = _AllToAll.apply(y, self.recv_counts, self.send_counts, self.members)
        return combine_rows(rows, None, self.plan)

    def _send_both(self, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Send vectors and gates together, or separately if half precision makes dtypes differ."""
        if x.dtype != gates.dtype:
            return self._send(gather_rows(x, self.plan)), self._send(gather_rows(gates, self.plan))
        received = self._send(gather_rows(torch.cat([x, gates], dim=1), self.plan))
        return received[:, : x.shape[1]].contiguous(), received[:, x.shape[1] :]

    def _send(self, rows: Tensor) -> Tensor:
        return _AllToAll.apply(rows, self.send_counts, self.recv_counts, self.members)


class AllToAllExchange:
    """The exchange for an expert-parallel group of several ranks.

    A token is sent once, with its gates, to each rank that holds any of its experts. That rank
    sends one vector back, the weighted sum of its experts' outputs. At most min(K, P) vectors per
    token therefore cross the network in each direction.

    Source: Shazeer et al. 2017, section 3.1.
    """

    def __init__(self, num_experts: int, group: ExpertParallelGroup) -> None:
        self.num_experts, self.group = num_experts, group

    def route(
        self, expert_ids: Tensor, num_rows: int | None = None, is_done: bool = False
    ) -> AllToAllRoute:
        """Determine which tokens go to which rank, and tell the ranks how many they will receive.

        The arguments are the same as in `LocalExchange.route`.
        """
        group, num_slots = self.group, expert_ids.shape[1]
        ranks = expert_ids.div(self.num_experts // group.size, rounding_mode="floor")
        plan = plan_ranks(ranks, group.size)
        send_counts = plan.offsets.diff()
        columns = [torch.full_like(send_counts, number) for number in (num_slots, is_done)]
        sent = torch.stack([send_counts, *columns], dim=1)
        received = torch.empty_like(sent)
        ones = [1] * group.size
        distributed.all_to_all_single(received, sent, ones, ones, group=group.members)
        recv_counts, all_slots, all_done = received.t().tolist()
        # Some gates choose a varying number of experts per token, so K may differ between ranks.
        spare = max(all_slots) - num_slots
        return AllToAllRoute(
            plan,
            F.pad(expert_ids, (0, spare), value=self.num_experts),
            send_counts=send_counts.tolist(),
            recv_counts=recv_counts,
            all_done=all(all_done),
            owned=group.owned(self.num_experts),
            members=group.members,
        )


Exchange = LocalExchange | AllToAllExchange
Route = LocalRoute | AllToAllRoute


def make_exchange(num_experts: int, group: ExpertParallelGroup) -> Exchange:
    """Return the exchange for `num_experts` experts spread over the ranks of `group`."""
    return LocalExchange() if group.size == 1 else AllToAllExchange(num_experts, group)


def plan_ranks(ranks: Tensor, num_ranks: int) -> RowPlan:
    """Plan one row for each rank that a token is sent to.

    Args:
        ranks: (N, K) int64, the rank of each slot's expert; P in an empty slot.
        num_ranks: Number of ranks, P.
    """
    ranks = ranks.sort(dim=1).values
    is_repeated = F.pad(ranks[:, 1:] == ranks[:, :-1], (1, 0))
    ranks = ranks.masked_fill(is_repeated, num_ranks)
    return plan_rows(ranks, num_ranks, int((ranks < num_ranks).sum()))


class _AllToAll(torch.autograd.Function):
    """An all-to-all that runs backward even without rows, because other ranks wait for it."""

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
    distributed.all_to_all_single(
        received, rows.contiguous(), recv_counts, send_counts, group=members
    )
    return received
