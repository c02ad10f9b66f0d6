"""The experts: feed-forward networks of one hidden ReLU layer."""

import torch
from torch import Tensor, nn

from nmt_moe.kernels import expert_ffn
from nmt_moe.moe.config import MoEConfig
from nmt_moe.parallel import mark_expert


class Experts(nn.Module):
    """All experts of a layer, without biases.

    Attributes:
        weight_in: (E, D, H), uniform within 1 / sqrt(D) at start.
        weight_out: (E, H, D), uniform within 1 / sqrt(H) at start.

    Source: Shazeer et al. 2017, section 2 and Appendix C.1.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(
            torch.empty(config.num_experts, config.model_dim, config.hidden_dim)
        )
        self.weight_out = nn.Parameter(
            torch.empty(config.num_experts, config.hidden_dim, config.model_dim)
        )
        for weight in (self.weight_in, self.weight_out):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            mark_expert(weight)

    def forward(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows: (R, D), sorted by expert.
            expert_offsets: (E + 1,) int64.

        Returns:
            (R, D).
        """
        weight_in: Tensor = self.weight_in
        weight_out: Tensor = self.weight_out
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight_in, weight_out = (
                rows.to(dtype),
                weight_in.to(dtype),
                weight_out.to(dtype),
            )
        return expert_ffn(rows, weight_in, weight_out, expert_offsets)
