"""The experts: feed-forward networks of one hidden ReLU layer."""

import torch
from torch import Tensor, nn

from nmt_moe.kernels import mixture_ffn
from nmt_moe.moe.config import MoEConfig
from nmt_moe.moe.dispatch import DispatchPlan


class Experts(nn.Module):
    """All experts of a layer, without biases.

    Attributes:
        weight_in: (E, D, H), uniform within 1 / sqrt(D) at start.
        weight_out: (E, H, D), uniform within 1 / sqrt(H) at start.

    Source: Shazeer et al. 2017, section 2 and Appendix C.1.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.recompute = config.recomputes
        self.weight_in = nn.Parameter(
            torch.empty(config.num_experts, config.model_dim, config.hidden_dim)
        )
        self.weight_out = nn.Parameter(
            torch.empty(config.num_experts, config.hidden_dim, config.model_dim)
        )
        for weight in (self.weight_in, self.weight_out):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

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
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
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
