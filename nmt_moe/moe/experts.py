"""The experts: feed-forward networks with one hidden ReLU layer."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from nmt_moe.kernels import RowPlan, mixture_ffn
from nmt_moe.moe.config import MoEConfig
from nmt_moe.parallel import ALONE, ExpertParallelGroup, cut_shard, mark_expert


class Experts(nn.Module):
    """One layer's experts on this rank. They have no biases.

    Attributes:
        weight_in: (L, D, H), the experts' first matrices, drawn uniformly from [-init_range,
            init_range]. If `init_range` is None, 1 / sqrt(D) is used.
        weight_out: (L, H, D), the experts' second matrices, drawn in the same way. If `init_range`
            is None, 1 / sqrt(H) is used.

    Source: Shazeer et al. 2017, section 2 and Appendix C.1.
    """

    def __init__(
        self,
        config: MoEConfig,
        group: ExpertParallelGroup = ALONE,
        init_range: float | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.recompute = config.num_experts, config.recomputes
        self.num_local_experts = config.num_experts // group.size
        shape = self.num_local_experts, config.model_dim, config.hidden_dim
        self.weight_in = nn.Parameter(torch.empty(shape))
        self.weight_out = nn.Parameter(torch.empty(shape).mT.contiguous())
        self.group, self.init_range = group, init_range
        self._mark()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights.

        Each expert has its own seed, drawn from torch's CPU generator. Therefore, neither its
        weights nor any numbers drawn later depend on the number of ranks.
        """
        if self.weight_in.is_meta:
            return  # weights on the meta device have no memory to fill
        seeds = torch.randint(2**62, 2**63 - 1, (self.num_experts,), device="cpu")
        generator = torch.Generator(self.weight_in.device)
        weights = [
            (weight, weight.shape[1] ** -0.5 if self.init_range is None else self.init_range)
            for weight in (self.weight_in, self.weight_out)
        ]
        for expert, seed in enumerate(seeds[self.group.owned(self.num_experts)].tolist()):
            generator.manual_seed(seed)
            for weight, bound in weights:
                weight[expert].uniform_(-bound, bound, generator=generator)

    def _mark(self) -> None:
        """Mark the weights, as is necessary whenever torch recreates them without their marks."""
        for weight in (self.weight_in, self.weight_out):
            mark_expert(weight, self.group)

    def __setstate__(self, state: dict[str, Any]) -> None:  # called by `copy` and `pickle`
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # called by `to`, `to_empty` and `half`
        self._mark()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Select this rank's experts from the weights of all experts."""
        for name in ("weight_in", "weight_out"):
            whole = state_dict.get(f"{prefix}{name}")
            if self.group.size > 1 and whole is not None and len(whole) == self.num_experts:
                state_dict[f"{prefix}{name}"] = cut_shard(whole, self.group)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor, gates: Tensor, plan: RowPlan) -> Tensor:
        """Return, for each token, the weighted sum of its experts' outputs.

        Args:
            x: (N, D), the tokens' vectors.
            gates: (N, K), weights of the chosen experts, in the dtype of `x` or wider; 0 in empty
                slots.
            plan: Row plan for this rank's experts.

        Returns:
            (N, D), the sums, in the dtype of `x`.

        Source: Shazeer et al. 2017, eq. 1.
        """
        weights = self.weight_in.to(x.dtype), self.weight_out.to(x.dtype)
        return mixture_ffn(x, gates, plan, *weights, recompute=self.recompute)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for experts: autocast's dtype if it is enabled, else the dtype of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
