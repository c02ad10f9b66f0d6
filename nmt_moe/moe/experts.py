"""The experts: feed-forward networks of one hidden ReLU layer."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from nmt_moe.kernels import mixture_ffn
from nmt_moe.moe.config import MoEConfig
from nmt_moe.moe.dispatch import DispatchPlan
from nmt_moe.parallel import (
    ALONE,
    ExpertParallelGroup,
    init_uniform,
    mark_expert,
    mark_shard,
)


class Experts(nn.Module):
    """The experts of a layer that this rank holds, without biases.

    Attributes:
        weight_in: (L, D, H), uniform within 1 / sqrt(D) at start.
        weight_out: (L, H, D), uniform within 1 / sqrt(H) at start.

    Source: Shazeer et al. 2017, section 2 and Appendix C.1.
    """

    def __init__(self, config: MoEConfig, group: ExpertParallelGroup = ALONE) -> None:
        super().__init__()
        self.recompute = config.recomputes
        num_local_experts = config.num_experts // group.size
        self.weight_in = nn.Parameter(
            torch.empty(num_local_experts, config.model_dim, config.hidden_dim)
        )
        self.weight_out = nn.Parameter(
            torch.empty(num_local_experts, config.hidden_dim, config.model_dim)
        )
        self.group = group
        self._mark()
        for weight in (self.weight_in, self.weight_out):
            init_uniform(weight, weight.shape[1] ** -0.5)

    def _mark(self) -> None:
        """Mark the weights; where torch makes them anew, the marks are gone."""
        for weight in (self.weight_in, self.weight_out):
            mark_expert(weight)
            if self.group.size > 1:
                mark_shard(weight, self.group)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of copies
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # of `to`, `to_empty`, `half`
        self._mark()
        return self

    def forward(self, x: Tensor, gates: Tensor, plan: DispatchPlan) -> Tensor:
        """Give each token the weighted sum of its experts' answers.

        Args:
            x: (N, D).
            gates: (N, K); 0 in empty slots.
            plan: Which token goes to which expert.

        Returns:
            (N, D), under autocast in its dtype.

        Source: Shazeer et al. 2017, eq. 1.
        """
        dtype = compute_dtype(x)
        return mixture_ffn(
            x.to(dtype),
            gates.to(dtype),
            plan.row_token,
            plan.token_rows,
            plan.expert_offsets,
            self.weight_in.to(dtype),
            self.weight_out.to(dtype),
            self.recompute,
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which experts compute: that of the tokens, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
