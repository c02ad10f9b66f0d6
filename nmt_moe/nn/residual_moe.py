"""The MoE layer as the networks use it, with a sigmoid, dropout and a residual connection."""

from torch import Tensor, nn

from nmt_moe.moe import MoEConfig, MoELayer, MoEStats
from nmt_moe.parallel import ALONE, ExpertParallelGroup


class ResidualMoE(nn.Module):
    """An MoE layer followed by a sigmoid, dropout and a residual connection.

    Source: Shazeer et al. 2017, Appendices C.1 and E.
    """

    def __init__(
        self,
        config: MoEConfig,
        dropout: float,
        name: str,
        group: ExpertParallelGroup = ALONE,
        init_range: float | None = None,
    ) -> None:
        super().__init__()
        self.moe = MoELayer(config, name, group, init_range)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, MoEStats]:
        """Apply the layer to all positions of all sentences as one batch of tokens.

        Args:
            x: (T, B, D), the inputs to the layer.
            padding_mask: (T, B) bool, True for padding; None for no padding.

        Returns:
            (T, B, D) outputs, and the layer's statistics.
        """
        flat_mask = None if padding_mask is None else padding_mask.reshape(-1)
        y, stats = self.moe(x.reshape(-1, x.shape[2]), flat_mask)
        return x + self.dropout(y.sigmoid()).view_as(x), stats
