"""Attention of the decoder over the encoder's outputs, in the paper's two forms."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Weigh source positions by a query.

    V starts at 1 / sqrt(D): drawn like a matrix, all weights would start equal; starting at 1,
    scores reach +-D as soon as the tanh saturate, and at a high learning rate the weights settle
    for good on one position (the end of the sentence) before attention is learnt.

    Source: Shazeer et al. 2017, Appendix G.
    """

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(model_dim, model_dim, bias=False)  # W
        self.scale = nn.Parameter(torch.full((model_dim,), model_dim**-0.5))  # V

    @staticmethod
    def keys(projected: Tensor) -> Tensor:
        """Return the keys, (B, S, D), of the projected source x U, (B, S, D)."""
        raise NotImplementedError

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return A(x_i, y_j), (B, T, S), of the projected queries y W, (B, T, D), and the keys."""
        raise NotImplementedError

    def forward(
        self, query: Tensor, keys: Tensor, source: Tensor, padding_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend from each query to its sentence.

        Args:
            query: (B, T, D).
            keys: (B, S, D), from `AttentionKeys`.
            source: (B, S, D).
            padding_mask: (B, S) bool, True = padding, which gets no weight.

        Returns:
            (B, T, D) context, and (B, T, S) weights, each row of which sums to 1.
        """
        scores = self.scores(self.projection(query), keys)
        scores = scores.masked_fill(padding_mask.unsqueeze(1), float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=2, dtype=wide).to(source.dtype)
        return torch.bmm(weights, source), weights


class ProductAttention(Attention):
    """sum_d V_d tanh((x_i U)_d) tanh((y_j W)_d): one matrix product over all pairs of steps.

    Source: Shazeer et al. 2017, eq. 22.
    """

    @staticmethod
    def keys(projected: Tensor) -> Tensor:
        """Return tanh(x U), computed once for each source sentence."""
        return torch.tanh(projected)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return A(x_i, y_j), (B, T, S)."""
        return torch.bmm(torch.tanh(query) * self.scale, keys.transpose(1, 2))


class AdditiveAttention(Attention):
    """sum_d V_d tanh((x_i U)_d + (y_j W)_d), GNMT's attention; takes memory for (B, T, S, D).

    Source: Shazeer et al. 2017, eq. 21.
    """

    @staticmethod
    def keys(projected: Tensor) -> Tensor:
        """Return x U as it is."""
        return projected

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return A(x_i, y_j), (B, T, S)."""
        return torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) @ self.scale


ATTENTIONS: dict[str, type[Attention]] = {
    "product": ProductAttention,
    "additive": AdditiveAttention,
}


class AttentionKeys(nn.Module):
    """The attention's part that depends on the source alone, computed once for each sentence."""

    def __init__(self, model_dim: int, attention: str) -> None:
        super().__init__()
        self.attention = ATTENTIONS[attention]
        self.projection = nn.Linear(model_dim, model_dim, bias=False)  # U

    def forward(self, source: Tensor) -> Tensor:
        """Map the encoder's outputs to keys: (B, S, D) to (B, S, D)."""
        return self.attention.keys(self.projection(source))
