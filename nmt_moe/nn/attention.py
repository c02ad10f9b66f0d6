"""The decoder's attention over the encoder's outputs, in the paper's two forms."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Weight source positions by their relevance to a query.

    V starts at 1 / sqrt(D). If it were drawn like a matrix, all attention weights would start
    equal; if it started at 1, scores would reach +-D as soon as the tanh saturates, and at a high
    learning rate the weights would get stuck on one position (the end of the sentence) before
    attention is learnt.

    Source: Shazeer et al. 2017, Appendix G.
    """

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(model_dim, model_dim, bias=False)  # W
        self.scale = nn.Parameter(torch.full((model_dim,), model_dim**-0.5))  # V

    @staticmethod
    def keys(projected: Tensor) -> Tensor:
        """Return the keys, (B, S, D), for the projected source x U, (B, S, D)."""
        raise NotImplementedError

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return A(x_i, y_j), (B, T, S), for the projected queries y W, (B, T, D), and the keys."""
        raise NotImplementedError

    def forward(
        self, query: Tensor, keys: Tensor, source: Tensor, padding_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend from each query to its sentence.

        Args:
            query: (B, T, D), decoder outputs that attend.
            keys: (B, S, D), from `AttentionKeys`.
            source: (B, S, D), the encoder's outputs.
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
    """Score by sum_d V_d tanh((x_i U)_d) tanh((y_j W)_d): one matrix product for all pairs.

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
    """Score by sum_d V_d tanh((x_i U)_d + (y_j W)_d), as GNMT does; needs memory (B, T, S, D).

    Source: Shazeer et al. 2017, eq. 21.
    """

    @staticmethod
    def keys(projected: Tensor) -> Tensor:
        """Return x U unchanged."""
        return projected

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return A(x_i, y_j), (B, T, S)."""
        return torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) @ self.scale


ATTENTIONS: dict[str, type[Attention]] = {
    "product": ProductAttention,
    "additive": AdditiveAttention,
}


class AttentionKeys(nn.Module):
    """The part of attention that depends only on the source, computed once for each sentence."""

    def __init__(self, model_dim: int, attention: str) -> None:
        super().__init__()
        self.attention = ATTENTIONS[attention]
        self.projection = nn.Linear(model_dim, model_dim, bias=False)  # U

    def forward(self, source: Tensor) -> Tensor:
        """Map the encoder's outputs to keys: (B, S, D) to (B, S, D)."""
        return self.attention.keys(self.projection(source))
