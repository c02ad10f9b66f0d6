"""Gates of two levels: a token's groups first, then the experts of each of its groups."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.kernels import gate_logits, gather_rows, noisy_top_k, row_groups
from nmt_moe.moe.config import MoEConfig
from nmt_moe.moe.dispatch import DispatchPlan, plan_dispatch
from nmt_moe.moe.gate import (
    NoisyTopKGate,
    StrictlyBalancedGate,
    batchwise_mask,
    batchwise_threshold_loss,
    gate_dtype,
    masked_softmax,
    over_threshold,
    to_slots,
)
from nmt_moe.moe.gate_output import GateOutput
from nmt_moe.parallel import sum_over_ranks

HierarchicalNoise = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GroupChoice:
    """What the secondary gates chose, in the order of rows: one (token, group) pair each.

    Attributes:
        gates: (R, K). Weights within the group; 0 in empty slots.
        ids: (R, K) int64. Expert within the group, group_size in empty slots.
        importance: (G, E / G). Sum of each expert's gates times the row's primary gate (eq. 13).
        load: (G, E / G). Load_i(X^(i)).
        threshold_loss: Scalar or None.
    """

    gates: Tensor
    ids: Tensor
    importance: Tensor
    load: Tensor
    threshold_loss: Tensor | None


class HierarchicalGate(nn.Module):
    """A primary gate over groups, and a secondary gate in each group for the tokens it gets.

    Expert j of group i is expert i * group_size + j. Its gate is the product of both levels'.

    Source: Shazeer et al. 2017, Appendix B, eqs. 12-14.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k, self.num_groups = config.top_k, config.num_groups
        self.group_size = config.group_size
        self.primary: NoisyTopKGate | StrictlyBalancedGate = self._make_primary(config)
        shape = config.num_groups, config.model_dim, config.group_size
        self.secondary_gate_weight = nn.Parameter(torch.zeros(shape))

    def _make_primary(self, config: MoEConfig) -> NoisyTopKGate | StrictlyBalancedGate:
        raise NotImplementedError

    def _choose(
        self, x: Tensor, row_gates: Tensor, plan: DispatchPlan, noise: Tensor | None
    ) -> GroupChoice:
        """Choose experts for the rows of `plan`, which are sorted by group.

        Args:
            x: (R, D).
            row_gates: (R,). The primary gate of each row.
            plan: Which rows each group has.
            noise: (N, E) or None.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, noise: HierarchicalNoise | None = None) -> GateOutput:
        """Choose the experts of each token.

        Args:
            x: (N, D).
            noise: (N, G) and (N, E) standard normal; drawn when None. In training only, and only
                with noisy gates.
        """
        primary_noise, secondary_noise = (None, None) if noise is None else noise
        primary = self.primary(x, primary_noise)
        plan = plan_dispatch(primary.expert_ids, self.num_groups, primary.num_rows)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(gate_dtype(x))
            rows = gather_rows(wide, plan.row_token, plan.token_rows)
            choice = self._choose(rows, _row_gates(primary, plan), plan, secondary_noise)
            gates, expert_ids = self._combine(primary, choice, plan)
            primary_load, counts = self._primary_balance(primary, plan)
            load = (primary_load / counts.clamp(min=1)).unsqueeze(1) * choice.load
        num_experts = self.num_groups * self.group_size
        losses = [
            loss for loss in (primary.threshold_loss, choice.threshold_loss) if loss is not None
        ]
        noisy = isinstance(self.primary, NoisyTopKGate)
        return GateOutput(
            gates,
            expert_ids,
            num_rows=int((expert_ids < num_experts).sum()) if not noisy else expert_ids.numel(),
            importance=choice.importance.flatten(),
            load=load.flatten(),
            can_balance_load=noisy and self.top_k < max(self.num_groups, self.group_size),
            threshold_loss=torch.stack(losses).sum() if losses else None,
        )

    def _primary_balance(self, primary: GateOutput, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        """Give (G,) loads and (G,) token counts of the groups, in training those of all ranks.

        So that the loads of all ranks' batches add up to the load of one batch of all tokens.
        """
        balance = torch.stack([primary.load, plan.tokens_per_expert.to(primary.load.dtype)])
        if self.training:
            balance = sum_over_ranks(balance)
        return balance[0], balance[1]

    def _combine(
        self, primary: GateOutput, choice: GroupChoice, plan: DispatchPlan
    ) -> tuple[Tensor, Tensor]:
        """Multiply both levels' gates, in the order of tokens.

        Returns:
            (N, K1 K2) gates and (N, K1 K2) int64 expert ids.
        """
        num_tokens, num_slots = primary.gates.shape
        # A slot without a group reads an extra row that has no experts.
        row_gates = F.pad(choice.gates, (0, 0, 0, 1))
        row_ids = F.pad(choice.ids, (0, 0, 0, 1), value=self.group_size)
        secondary_gates = row_gates[plan.token_rows]  # (N, K1, K2)
        secondary_ids = row_ids[plan.token_rows]
        gates = primary.gates.unsqueeze(2) * secondary_gates
        ids = primary.expert_ids.unsqueeze(2) * self.group_size + secondary_ids
        empty = secondary_ids == self.group_size
        ids = ids.masked_fill(empty, self.num_groups * self.group_size)
        shape = num_tokens, num_slots * secondary_ids.shape[2]
        return gates.masked_fill(empty, 0.0).reshape(shape), ids.reshape(shape)


def _row_gates(primary: GateOutput, plan: DispatchPlan) -> Tensor:
    """(R,): the primary gate of each row."""
    # One place more: empty slots write there.
    places = primary.gates.new_zeros(len(plan.row_token) + 1)
    return places.scatter(0, plan.token_rows.flatten(), primary.gates.flatten())[:-1]


class HierarchicalNoisyTopKGate(HierarchicalGate):
    """Noisy top-k gating at both levels.

    Attributes:
        secondary_gate_weight: (G, D, E / G), zeros at start.
        secondary_noise_weight: (G, D, E / G), zeros at start.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.secondary_noise_weight = nn.Parameter(torch.zeros_like(self.secondary_gate_weight))

    def _make_primary(self, config: MoEConfig) -> NoisyTopKGate:
        return NoisyTopKGate(config.model_dim, config.num_groups, config.top_k)

    def _choose(
        self, x: Tensor, row_gates: Tensor, plan: DispatchPlan, noise: Tensor | None
    ) -> GroupChoice:
        clean, raw_scale = gate_logits(
            x,
            self.secondary_gate_weight.to(x.dtype),
            self.secondary_noise_weight.to(x.dtype) if self.training else None,
            plan.expert_offsets,
        )
        row_noise = None
        if noise is not None and self.training:
            row_noise = self._row_noise(noise.to(x.dtype), plan)
        offsets = plan.expert_offsets
        gating = noisy_top_k(clean, raw_scale, self.top_k, row_noise, offsets, row_gates)
        return GroupChoice(gating.gates, gating.expert_ids, gating.importance, gating.load, None)

    def _row_noise(self, noise: Tensor, plan: DispatchPlan) -> Tensor:
        """Pick each row's (R, E / G) noise from (N, E)."""
        row_group = row_groups(plan.expert_offsets, len(plan.row_token))
        return noise.view(-1, self.num_groups, self.group_size)[plan.row_token, row_group]


class HierarchicalStrictlyBalancedGate(HierarchicalGate):
    """Strict balance at both levels.

    Each group takes its share of the tokens, each of its experts a share of the group's.

    Attributes:
        secondary_gate_weight: (G, D, E / G), zeros at start.
        secondary_threshold: (G, E / G).
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        size = config.group_size
        self.secondary_threshold = nn.Parameter(torch.full((config.num_groups, size), 1 / size))

    def _make_primary(self, config: MoEConfig) -> StrictlyBalancedGate:
        return StrictlyBalancedGate(config.model_dim, config.num_groups, config.top_k)

    def _choose(
        self, x: Tensor, row_gates: Tensor, plan: DispatchPlan, noise: Tensor | None
    ) -> GroupChoice:
        offsets = plan.expert_offsets
        logits, _ = gate_logits(x, self.secondary_gate_weight.to(x.dtype), None, offsets)
        probs = logits.detach().softmax(dim=1)
        # By brackets: the gradient of equal indices is then added up in a fixed order.
        threshold = self.secondary_threshold.to(x.dtype)[row_groups(offsets, len(x))]
        if self.training:
            mask = batchwise_mask(probs, self.top_k, offsets)
            loss = batchwise_threshold_loss(probs, threshold, mask) / max(len(x), 1)
        else:
            mask, loss = over_threshold(probs, threshold), x.new_zeros(())
        gates = masked_softmax(logits, mask)
        slot_gates, slot_ids = to_slots(gates, mask)
        importance = torch.segment_reduce(row_gates.unsqueeze(1) * gates, "sum", offsets=offsets)
        load = torch.segment_reduce(mask.to(x.dtype), "sum", offsets=offsets)
        return GroupChoice(slot_gates, slot_ids, importance, load, loss)
