"""Experts of which each rank holds its own: tokens travel to them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.kernels import combine_rows, gather_rows
from nmt_moe.moe.config import MoEConfig
from nmt_moe.moe.dispatch import DispatchPlan, plan_dispatch
from nmt_moe.moe.experts import Experts, compute_dtype
from nmt_moe.parallel import ExpertParallelGroup, Route, cut_shard, plan_route


class ShardedExperts(Experts):
    """This rank's experts, at the service of the tokens of all ranks of the group.

    A token travels once to each rank that holds any of its experts, its gates beside it, and the
    rank sends one row back: the weighted sum of its experts' answers. So rows on the network number
    at most min(K, P) a token each way.

    Source: Shazeer et al. 2017, section 3.1.
    """

    def __init__(self, config: MoEConfig, group: ExpertParallelGroup) -> None:
        super().__init__(config, group)
        self.num_experts = config.num_experts

    def forward(self, x: Tensor, gates: Tensor, plan: DispatchPlan) -> Tensor:
        """Give each token the weighted sum of its experts' answers.

        All ranks of the group must call, and go backward, the same number of times, with or
        without tokens.

        Args:
            x: (N, D).
            gates: (N, K); 0 in empty slots.
            plan: Which token goes to which expert, of all E.

        Returns:
            (N, D), under autocast in its dtype.
        """
        visits = plan_visits(plan.expert_ids, self.num_experts, self.group.size)
        route = plan_route(visits.tokens_per_expert, gates.shape[1], self.group)
        return self._travel(x, gates, plan.expert_ids, visits, route)

    @torch.no_grad()
    def serve(self) -> None:
        """Answer the tokens of other ranks until all ranks of the group have called this.

        For loops that need more passes on some ranks than on others, such as a search: a rank that
        has ended its own calls this, and all ranks of the group return together.
        """
        x = self.weight_in.new_empty(0, self.weight_in.shape[1])
        expert_ids = torch.empty(0, 1, dtype=torch.int64, device=x.device)
        visits = plan_visits(expert_ids, self.num_experts, self.group.size)
        while True:
            route = plan_route(visits.tokens_per_expert, 1, self.group, is_done=True)
            if route.all_done:
                return
            self._travel(x, x.new_empty(0, 1), expert_ids, visits, route)

    def _travel(
        self, x: Tensor, gates: Tensor, expert_ids: Tensor, visits: DispatchPlan, route: Route
    ) -> Tensor:
        """Send tokens (N, D) to their experts' ranks, answer those that come, add up answers."""
        dtype, model_dim = compute_dtype(x), x.shape[1]
        spare = (0, route.num_slots - gates.shape[1])
        ids = F.pad(expert_ids, spare, value=self.num_experts)
        token_and_gates = torch.cat([x.to(dtype), F.pad(gates.to(dtype), spare)], dim=1)

        sent = gather_rows(token_and_gates, visits.row_token, visits.token_rows)
        guests = route.to_owners(sent)
        guest_ids = route.to_owners(ids.index_select(0, visits.row_token).int())
        answers = self._answer(guests[:, :model_dim], guests[:, model_dim:], guest_ids.long())
        rows = route.to_senders(answers)

        is_used = (visits.token_rows < len(rows)).to(dtype)
        return combine_rows(rows, is_used, visits.row_token, visits.token_rows)

    def _answer(self, x: Tensor, gates: Tensor, expert_ids: Tensor) -> Tensor:
        """Sum up what this rank's experts say to rows (R, D), whichever rank they are of.

        Args:
            x: (R, D).
            gates: (R, K), of all experts of a row's token.
            expert_ids: (R, K) int64, global; E in an empty slot.
        """
        owned = self.group.owned(self.num_experts)
        is_here = (expert_ids >= owned.start) & (expert_ids < owned.stop)
        num_local_experts = owned.stop - owned.start
        local_ids = torch.where(is_here, expert_ids - owned.start, num_local_experts)
        plan = plan_dispatch(local_ids, num_local_experts, int(is_here.sum()))
        return super().forward(x.contiguous(), gates.masked_fill(~is_here, 0.0), plan)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take this rank's slices out of the weights of all experts."""
        for name in ("weight_in", "weight_out"):
            whole = state_dict.get(f"{prefix}{name}")
            if whole is not None and len(whole) == self.num_experts:
                state_dict[f"{prefix}{name}"] = cut_shard(whole, self.group)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def plan_visits(expert_ids: Tensor, num_experts: int, num_ranks: int) -> DispatchPlan:
    """List the ranks that each token visits, each once: a plan with ranks in the place of experts.

    Args:
        expert_ids: (N, K) int64; E in an empty slot.
        num_experts: E.
        num_ranks: P.

    Returns:
        The plan; its rows are sorted by rank, for a rank by token.
    """
    ranks = expert_ids.div(num_experts // num_ranks, rounding_mode="floor").sort(dim=1).values
    is_repeated = F.pad(ranks[:, 1:] == ranks[:, :-1], (1, 0))
    ranks = ranks.masked_fill(is_repeated, num_ranks)
    return plan_dispatch(ranks, num_ranks, int((ranks < num_ranks).sum()))
