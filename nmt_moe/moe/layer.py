"""The mixture-of-experts layer."""

import torch
from torch import Tensor, nn

from nmt_moe.checks import check_finite, check_like, check_shape
from nmt_moe.moe.config import MoEConfig
from nmt_moe.moe.dispatch import plan_dispatch
from nmt_moe.moe.experts import Experts
from nmt_moe.moe.gate import NoisyTopKGate, SoftmaxGate, StrictlyBalancedGate
from nmt_moe.moe.hierarchical_gate import (
    HierarchicalNoise,
    HierarchicalNoisyTopKGate,
    HierarchicalStrictlyBalancedGate,
)
from nmt_moe.moe.losses import importance_loss, load_loss
from nmt_moe.moe.sharded_experts import ShardedExperts
from nmt_moe.moe.stats import MoEStats
from nmt_moe.parallel import ALONE, ExpertParallelGroup, sum_over_ranks

Noise = Tensor | HierarchicalNoise


class MoELayer(nn.Module):
    """Send each token to its top-k experts and add up their weighted answers.

    No token is dropped and no expert has a capacity. The sum over a token's experts runs in a
    fixed order, so equal inputs give equal bits.

    Source: Shazeer et al. 2017, section 2, figure 1.
    """

    def __init__(
        self,
        config: MoEConfig,
        name: str = "MoE layer",
        group: ExpertParallelGroup = ALONE,
    ) -> None:
        """Make the layer.

        Args:
            config: Its sizes and choices.
            name: What errors call it.
            group: The ranks that share the experts. All of them must call the layer, and go
                backward through it, the same number of times, with or without tokens.
        """
        super().__init__()
        self.config = config
        self.name = name
        self.gate = build_gate(config)
        self.experts = (Experts if group.size == 1 else ShardedExperts)(config, group)
        self.group = group

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, noise: Noise | None = None
    ) -> tuple[Tensor, MoEStats]:
        """Compute y = sum_i G(x)_i E_i(x).

        Args:
            x: (N, D).
            padding_mask: (N,) bool, True = padding. Such rows of y are 0; they reach no expert,
                no loss and no statistic.
            noise: (N, E) standard normal, to reproduce a pass; with groups, a tuple of (N, G) and
                (N, E). Drawn when None. Of noisy gates, in training only.

        Returns:
            y: (N, D), in the dtype of x.
            stats: Balance and balance losses of this batch.

        Raises:
            ValueError: if a shape, dtype or device does not fit.
            FloatingPointError: naming the layer, if a token is not finite.

        Source: Shazeer et al. 2017, eq. 1.
        """
        check_shape("x", x, (None, self.config.model_dim), "(N, D)")
        self._check_tensors(x, padding_mask, noise)
        if padding_mask is None:
            return self._forward_tokens(x, noise)
        tokens = (~padding_mask).nonzero().squeeze(1)
        if isinstance(noise, tuple):
            noise = noise[0][tokens], noise[1][tokens]
        elif noise is not None:
            noise = noise[tokens]
        y, stats = self._forward_tokens(x.index_select(0, tokens), noise)
        # Token indices differ, so index_copy is deterministic.
        return torch.zeros_like(x).index_copy(0, tokens, y), stats

    def _forward_tokens(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, MoEStats]:
        config = self.config
        out = self.gate(x, noise)
        # Whatever is not finite in a token or in a weight shows in its gates, hence here.
        check_finite(f"the tokens or gate weights of the {self.name}", out.importance)
        plan = plan_dispatch(out.expert_ids, config.num_experts, out.num_rows)
        y = self.experts(x, out.gates, plan)
        importance, load = out.importance, out.load
        if self.training:
            # A part of a batch is less even than the whole, so balance is judged over all ranks.
            importance, load = sum_over_ranks(torch.stack([importance, load]))
        load_weight = config.load_weight if out.can_balance_load else 0.0
        no_loss = out.importance.new_zeros(())
        return y.to(x.dtype), MoEStats(
            importance=out.importance,
            load=out.load,
            tokens_per_expert=plan.tokens_per_expert,
            importance_loss=importance_loss(importance, config.importance_weight),
            load_loss=load_loss(load, load_weight),
            threshold_loss=no_loss if out.threshold_loss is None else out.threshold_loss,
        )

    def _check_tensors(self, x: Tensor, padding_mask: Tensor | None, noise: Noise | None) -> None:
        """Refuse tensors that do not fit the weights or each other."""
        weight = self.experts.weight_in
        is_autocast = torch.is_autocast_enabled(weight.device.type)
        check_like("x", x, None if is_autocast else weight.dtype, weight.device)
        if padding_mask is not None:
            check_shape("padding_mask", padding_mask, (len(x),), "(N,)")
            check_like("padding_mask", padding_mask, torch.bool, x.device)
        if noise is not None:
            self._check_noise(noise, x)

    def _check_noise(self, noise: Noise, x: Tensor) -> None:
        """Refuse noise of another form than the gate draws."""
        num_groups, num_experts = self.config.num_groups, self.config.num_experts
        parts = noise if isinstance(noise, tuple) else (noise,)
        is_pair = isinstance(noise, tuple) and len(noise) == 2
        if is_pair != bool(num_groups) or not all(isinstance(part, Tensor) for part in parts):
            wanted = "a pair (N, G), (N, E) in a tuple" if num_groups else "one tensor (N, E)"
            raise ValueError(
                f"`noise` must be {wanted} with num_groups = {num_groups}, but is "
                f"({', '.join(type(part).__name__ for part in parts)})."
            )
        if num_groups:
            check_shape("noise[0]", parts[0], (len(x), num_groups), "(N, G)")
        check_shape("noise", parts[-1], (len(x), num_experts), "(N, E)")
        for part in parts:
            check_like("noise", part, None, x.device)


def build_gate(config: MoEConfig) -> nn.Module:
    """Make the gate that `config` names."""
    if config.num_groups:
        if config.gate == "noisy_top_k":
            return HierarchicalNoisyTopKGate(config)
        return HierarchicalStrictlyBalancedGate(config)
    if config.gate == "softmax":
        return SoftmaxGate(config.model_dim, config.num_experts)
    gate = NoisyTopKGate if config.gate == "noisy_top_k" else StrictlyBalancedGate
    return gate(config.model_dim, config.num_experts, config.top_k)
