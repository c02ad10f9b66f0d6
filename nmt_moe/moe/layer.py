"""The mixture-of-experts layer."""

import torch
from torch import Tensor, nn

from nmt_moe.kernels import Gating, is_captured, is_on_host, plan_rows
from nmt_moe.moe.config import MoEConfig
from nmt_moe.moe.experts import Experts, compute_dtype
from nmt_moe.moe.gate import NoisyTopKGate, SoftmaxGate, StrictlyBalancedGate, gate_dtype
from nmt_moe.moe.hierarchical_gate import HierarchicalGate
from nmt_moe.moe.inputs import Noise, check_inputs
from nmt_moe.moe.losses import squared_cv
from nmt_moe.moe.padding import Unpadded, drop_padding
from nmt_moe.moe.stats import MoEStats
from nmt_moe.parallel import ALONE, ExpertParallelGroup, Route, make_exchange, sum_over_ranks

Gate = SoftmaxGate | NoisyTopKGate | StrictlyBalancedGate | HierarchicalGate


class MoELayer(nn.Module):
    """A layer that sends each token to its top-k experts and adds up their weighted outputs.

    No token is dropped, and experts have no capacity limit. Outputs are added up in a fixed order,
    so equal inputs give bit-identical results.

    Source: Shazeer et al. 2017, section 2, figure 1.
    """

    def __init__(
        self,
        config: MoEConfig,
        name: str = "MoE layer",
        group: ExpertParallelGroup = ALONE,
        init_range: float | None = None,
    ) -> None:
        """Build the layer.

        Args:
            config: Configuration of the layer.
            name: Name of the layer in error messages.
            group: The ranks that together hold every expert once. All of them must run the forward
                and the backward pass the same number of times, even if they have no tokens.
            init_range: Experts' weights are drawn uniformly from [-init_range, init_range]; None
                for 1 / sqrt(number of inputs).

        Raises:
            ValueError: if `config` is not a `MoEConfig`.
        """
        super().__init__()
        if not isinstance(config, MoEConfig):
            raise ValueError(
                f"`config` must be a MoEConfig, but is a {type(config).__name__}. "
                "Use `MoELayer(MoEConfig(model_dim=..., hidden_dim=..., num_experts=...))`."
            )
        self.config = config
        self.name = name
        self.gate = build_gate(config)
        self.exchange = make_exchange(config.num_experts, group)
        self.experts = Experts(config, group, init_range)
        self.group = group

    def extra_repr(self) -> str:
        """Return the layer's configuration as text for `print`."""
        config = self.config
        words = [
            f"model_dim={config.model_dim}, hidden_dim={config.hidden_dim}",
            f"num_experts={config.num_experts}, top_k={config.top_k}, gate={config.gate!r}",
        ]
        if config.num_groups:
            words.append(f"num_groups={config.num_groups}")
        if self.group.size > 1:
            words.append(f"local_experts={self.experts.num_local_experts}")
        return ", ".join(words)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, noise: Noise | None = None
    ) -> tuple[Tensor, MoEStats]:
        """Compute y = sum_i G(x)_i E_i(x).

        During training on a GPU, the host does not wait for the device, except with strictly
        balanced gates or with experts spread over ranks. The check that tokens are finite is
        therefore skipped during training on a GPU. It is also skipped in evaluation while a CUDA
        graph is captured. Call `MoEStats.check_finite` to run it. Each replay of a graph draws new
        noise.

        `torch.compile` skips the layer, because its shapes depend on the choice of experts. The
        model around the layer is compiled, but `fullgraph=True` and `torch.export` do not work.

        Args:
            x: (N, D), the tokens' vectors.
            padding_mask: (N,) bool, True for padding. Padding is not sent to any expert or counted
                in losses and statistics, and gives rows of zeros in y.
            noise: (N, E), standard normal numbers to use instead of new ones, to reproduce a pass;
                with groups, a tuple of (N, G) and (N, E). If None, they are drawn at random. They
                are used only by noisy gates during training.

        Returns:
            y: (N, D), in the dtype of x.
            stats: The chosen experts, their balance, and the balance losses of this batch.

        Raises:
            ValueError: if a shape, dtype or device is wrong.
            FloatingPointError: if a token is not finite; the message names the layer.

        Source: Shazeer et al. 2017, eq. 1.
        """
        if torch.compiler.is_compiling():
            return _compute_uncompiled(self, x, padding_mask, noise)
        return self._compute(x, padding_mask, noise)

    def _compute(
        self, x: Tensor, padding_mask: Tensor | None, noise: Noise | None
    ) -> tuple[Tensor, MoEStats]:
        check_inputs(self.config, self.experts.weight_in, x, padding_mask, noise)
        rows = drop_padding(padding_mask, may_wait=self.gate.waits)
        tokens = rows.take(x)
        if isinstance(noise, tuple):
            noise = rows.take(noise[0]), rows.take(noise[1])
        elif noise is not None:
            noise = rows.take(noise)

        gating = self.gate(tokens, noise, rows.row_offsets)
        stats = self._balance(gating, rows, len(x))
        if is_on_host(x) or not (self.training or is_captured(x)):
            stats.check_finite()
        route = self.exchange.route(gating.expert_ids, gating.num_rows)
        y = self._mix(tokens, gating.gates, route)
        return rows.put_back(y, len(x)), stats

    def _mix(self, x: Tensor, gates: Tensor, route: Route) -> Tensor:
        """Send tokens, (N, D), to their experts and add up the outputs, (N, D).

        Gates stay in float32 or wider, because they would not sum to 1 if they were rounded to half
        precision.
        """
        arrivals = route.to_experts(x.to(compute_dtype(x)), gates)
        plan = plan_rows(arrivals.expert_ids, self.experts.num_local_experts, arrivals.num_rows)
        y = self.experts(arrivals.x, arrivals.gates, plan)
        return route.to_tokens(y).to(x.dtype)

    @torch.no_grad()
    def serve(self) -> None:
        """Compute experts for other ranks' tokens until all ranks of the group have called this.

        Loops that run longer on some ranks than on others, such as a search, need this method. A
        rank calls it after its last step, and the call returns on all ranks of the expert-parallel
        group together.
        """
        weight = self.experts.weight_in
        x = weight.new_empty(0, self.config.model_dim)
        gates = weight.new_empty(0, 1, dtype=gate_dtype(x))
        expert_ids = torch.empty(0, 1, dtype=torch.int64, device=x.device)
        while not (route := self.exchange.route(expert_ids, is_done=True)).all_done:
            self._mix(x, gates, route)

    def _balance(self, gating: Gating, rows: Unpadded, num_rows: int) -> MoEStats:
        """Compute the balance losses, and collect the statistics of a batch."""
        sums = torch.stack([gating.importance, gating.load])
        if self.training:
            # Sum over all ranks, because a part of a batch is less balanced than the whole.
            sums = sum_over_ranks(sums)
        importance_cv, load_cv = squared_cv(sums).unbind()  # one call for importance and load
        load_weight = self.config.load_weight if self.gate.can_balance_load else 0.0
        return MoEStats(
            gating,
            rows,
            num_rows,
            importance_loss=self.config.importance_weight * importance_cv,
            load_loss=load_weight * load_cv,
            name=self.name,
        )


# This does the same as `torch.compiler.disable`, but does not import the compiler, which takes
# seconds.
@torch._disable_dynamo
def _compute_uncompiled(
    layer: MoELayer, x: Tensor, padding_mask: Tensor | None, noise: Noise | None
) -> tuple[Tensor, MoEStats]:
    return layer._compute(x, padding_mask, noise)


def build_gate(config: MoEConfig) -> Gate:
    """Build the gate that `config` names."""
    if config.gate == "softmax":
        return SoftmaxGate(config.model_dim, config.num_experts)
    gate = NoisyTopKGate if config.gate == "noisy_top_k" else StrictlyBalancedGate
    if not config.num_groups:
        return gate(config.model_dim, config.num_experts, config.top_k)
    return HierarchicalGate(
        primary=gate(config.model_dim, config.num_groups, config.top_k),
        secondary=gate(config.model_dim, config.group_size, config.top_k, config.num_groups),
    )
