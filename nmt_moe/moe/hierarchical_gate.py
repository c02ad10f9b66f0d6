"""Hierarchical gates, which choose a token's groups, and then experts within each of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.kernels import Gating, RowPlan, gather_rows, plan_rows, row_groups
from nmt_moe.moe.gate import NoisyTopKGate, StrictlyBalancedGate, gate_dtype
from nmt_moe.parallel import sum_over_ranks

HierarchicalNoise = tuple[Tensor, Tensor]
FlatGate = NoisyTopKGate | StrictlyBalancedGate


class HierarchicalGate(nn.Module):
    """A gate that chooses groups, and a gate for each group that chooses among its experts.

    Expert j of group i is expert i * group_size + j. Its gate is the product of the gate of its
    group and its gate within the group.

    Attributes:
        primary: One gate over G groups.
        secondary: G gates over E / G experts. In checkpoints, `secondary.gate_weight` is called
            `secondary_gate_weight`; its other parameters are renamed in the same way.

    Source: Shazeer et al. 2017, Appendix B, eqs. 12-14.
    """

    def __init__(self, primary: FlatGate, secondary: FlatGate) -> None:
        super().__init__()
        # Saved optimizer states rely on this order of parameters, so it must not change.
        self.secondary, self.primary = secondary, primary
        self.num_groups, _, self.group_size = secondary.gate_weight.shape
        self.can_balance_load = primary.can_balance_load or secondary.can_balance_load
        self.waits = primary.waits or secondary.waits
        self.register_state_dict_post_hook(_to_saved_names)
        self.register_load_state_dict_pre_hook(_from_saved_names)

    def forward(
        self,
        x: Tensor,
        noise: HierarchicalNoise | None = None,
        row_offsets: Tensor | None = None,
    ) -> Gating:
        """Choose the experts of each token.

        Args:
            x: (N, D), the tokens' vectors.
            noise: (N, G) and (N, E), standard normal numbers, used only by noisy gates during
                training. If None, they are drawn at random.
            row_offsets: (3,) int64, [0, number of tokens, N]; the rows after the tokens are
                padding. None if there is no padding.
        """
        primary_noise, secondary_noise = (None, None) if noise is None else noise
        primary = self.primary(x, primary_noise, row_offsets)
        plan = plan_rows(primary.expert_ids, self.num_groups, primary.num_rows)
        with torch.autocast(x.device.type, enabled=False):
            rows = gather_rows(x.to(gate_dtype(x)), plan)
            row_gates = _by_row(primary.gates, plan)
            if secondary_noise is not None:
                secondary_noise = self._row_noise(secondary_noise, plan)
            secondary = self.secondary(rows, secondary_noise, plan.offsets, row_gates)
            gates, expert_ids = self._multiply(primary, secondary, plan)
            load = self._mean_load(primary).unsqueeze(1) * secondary.load
        losses = [gating.threshold_loss for gating in (primary, secondary)]
        losses = [loss for loss in losses if loss is not None]
        return Gating(
            gates,
            expert_ids,
            importance=secondary.importance.flatten(),
            load=load.flatten(),
            tokens_per_expert=secondary.tokens_per_expert.flatten(),
            threshold_loss=torch.stack(losses).sum() if losses else None,
            num_rows=secondary.num_rows,
        )

    def _mean_load(self, primary: Gating) -> Tensor:
        """Return each group's load divided by its number of tokens, (G,).

        During training, the load and the number of tokens are summed over all ranks first, so that
        the loads of all ranks add up to the load of a single batch with all tokens.
        """
        balance = torch.stack([primary.load, primary.tokens_per_expert.to(primary.load.dtype)])
        if self.training:
            balance = sum_over_ranks(balance)
        return balance[0] / balance[1].clamp(min=1)

    def _row_noise(self, noise: Tensor, plan: RowPlan) -> Tensor:
        """Select each row's noise: (R, E / G) from (N, E)."""
        row_group = row_groups(plan.offsets, len(plan.row_token))
        return noise.view(-1, self.num_groups, self.group_size)[plan.row_token, row_group]

    def _multiply(self, primary: Gating, secondary: Gating, plan: RowPlan) -> tuple[Tensor, Tensor]:
        """Multiply the gates of both levels.

        Returns:
            (N, K1 K2) gates and (N, K1 K2) int64 expert ids, both in the order of tokens.
        """
        # A slot without a group reads an extra row without experts.
        row_gates = F.pad(secondary.gates, (0, 0, 0, 1))
        row_ids = F.pad(secondary.expert_ids, (0, 0, 0, 1), value=self.group_size)
        secondary_ids = row_ids[plan.token_rows]  # (N, K1, K2)
        gates = primary.gates.unsqueeze(2) * row_gates[plan.token_rows]
        ids = primary.expert_ids.unsqueeze(2) * self.group_size + secondary_ids
        is_empty = secondary_ids == self.group_size
        ids = ids.masked_fill(is_empty, self.num_groups * self.group_size)
        return gates.masked_fill(is_empty, 0.0).flatten(1), ids.flatten(1)


def _by_row(gates: Tensor, plan: RowPlan) -> Tensor:
    """Return the gate of each row, (R,), given the gates of each token, (N, K)."""
    # Empty slots write to one extra element.
    row_gates = gates.new_zeros(len(plan.row_token) + 1)
    return row_gates.scatter(0, plan.token_rows.flatten(), gates.flatten())[:-1]


def _to_saved_names(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(state, f"{prefix}secondary.", f"{prefix}secondary_")


def _from_saved_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, f"{prefix}secondary_", f"{prefix}secondary.")


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
