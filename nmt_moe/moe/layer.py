"""The mixture-of-experts layer."""

import torch
from torch import Tensor, nn

from nmt_moe.checks import check_shape
from nmt_moe.kernels import combine_rows, gather_rows
from nmt_moe.moe.config import MoEConfig
from nmt_moe.moe.dispatch import plan_dispatch
from nmt_moe.moe.experts import Experts
from nmt_moe.moe.gate import NoisyTopKGate
from nmt_moe.moe.losses import importance_loss, load_loss
from nmt_moe.moe.stats import MoEStats
from nmt_moe.parallel import LocalExchange


class MoELayer(nn.Module):
    """Send each token to its top-k experts and add up their weighted answers.

    No token is dropped and no expert has a capacity. The sum over a token's experts runs in a
    fixed order, so equal inputs give equal bits.

    Source: Shazeer et al. 2017, section 2, figure 1.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = NoisyTopKGate(config)
        self.experts = Experts(config)
        self.exchange = LocalExchange()

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, MoEStats]:
        """Compute y = sum_i G(x)_i E_i(x).

        Args:
            x: (N, D).
            padding_mask: (N,) bool, True = padding. Such rows of y are 0; they reach no expert,
                no loss and no statistic.
            noise: (N, E) standard normal, to reproduce a pass; drawn when None. Training only.

        Returns:
            y: (N, D), in the dtype of x.
            stats: Balance and balance losses of this batch.

        Raises:
            ValueError: if a shape does not fit.

        Source: Shazeer et al. 2017, eq. 1.
        """
        check_shape("x", x, (None, self.config.model_dim), "(N, D)")
        if noise is not None:
            check_shape("noise", noise, (len(x), self.config.num_experts), "(N, E)")
        if padding_mask is None:
            return self._forward_tokens(x, noise)
        check_shape("padding_mask", padding_mask, (len(x),), "(N,)")
        tokens = (~padding_mask).nonzero().squeeze(1)
        y, stats = self._forward_tokens(x[tokens], None if noise is None else noise[tokens])
        # Token indices differ, so index_copy is deterministic.
        return torch.zeros_like(x).index_copy(0, tokens, y), stats

    def _forward_tokens(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, MoEStats]:
        gates, expert_ids, importance, load = self.gate(x, noise)  # (N, K), (N, K), (E,), (E,)
        plan = plan_dispatch(expert_ids, self.config.num_experts)
        route = self.exchange.route(plan.expert_offsets)
        rows = route.to_experts(gather_rows(x, plan.row_token, plan.token_rows))  # (R, D)
        rows = route.to_tokens(self.experts(rows, route.expert_offsets))
        y = combine_rows(rows, gates.to(rows.dtype), plan.row_token, plan.token_rows)
        load_can_change = self.config.top_k < self.config.num_experts
        return y.to(x.dtype), MoEStats(
            importance=importance,
            load=load,
            tokens_per_expert=plan.tokens_per_expert,
            importance_loss=importance_loss(importance, self.config.importance_weight),
            load_loss=load_loss(load, self.config.load_weight if load_can_change else 0.0),
        )
