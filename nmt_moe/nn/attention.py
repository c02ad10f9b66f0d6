"""The decoder's attention over the encoder's outputs, in the paper's two forms."""

import torch
from torch import Tensor, nn

from nmt_moe.nn.linear import Linear


class Attention(nn.Module):
    """A module that weights source positions by their relevance to a query.

    V starts at 1 / sqrt(D). If it were initialised like a matrix, all attention weights would be
    equal at the start. If it started at 1, scores would reach +-D as soon as the tanh saturated,
    and at a high learning rate, attention would get stuck on one position (the end of the sentence)
    before it had been learnt.

    Source: Shazeer et al. 2017, Appendix G.
    """

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.projection = Linear(model_dim, model_dim)  # W
        self.scale = nn.Parameter(torch.full((model_dim,), model_dim**-0.5))  # V

    @staticmethod
    def keys(projected: Tensor) -> Tensor:
        """Return the keys, (B, S, D), given the projected source x U, (B, S, D)."""
        raise NotImplementedError

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return A(x_i, y_j), (B, T, S), given the projected queries y W, (B, T, D), and keys."""
        raise NotImplementedError

    def forward(
        self, query: Tensor, keys: Tensor, source: Tensor, padding_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute, for each query, attention over its source sentence.

        Args:
            query: (B, T, D), decoder outputs to use as queries.
            keys: (B, S, D), the result of `AttentionKeys`.
            source: (B, S, D), the encoder's outputs.
            padding_mask: (B, S) bool, True for padding, which gets the weight 0.

        Returns:
            (B, T, D) contexts, and (B, T, S) attention weights. Each row of weights sums to 1.
        """
        scores = self.scores(self.projection(query), keys)
        scores = scores.masked_fill(padding_mask.unsqueeze(1), float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=2, dtype=wide).to(source.dtype)
        return torch.bmm(weights, source), weights


class ProductAttention(Attention):
    """Attention that scores a pair by sum_d V_d tanh((x_i U)_d) tanh((y_j W)_d).

    A single matrix product computes the scores of all pairs.

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
    """Attention that scores a pair by sum_d V_d tanh((x_i U)_d + (y_j W)_d), as in GNMT.

    This needs memory for a (B, T, S, D) tensor.

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
        self.projection = Linear(model_dim, model_dim)  # U

    def forward(self, source: Tensor) -> Tensor:
        """Compute the keys, (B, S, D), from the encoder's outputs, (B, S, D)."""
        return self.attention.keys(self.projection(source))
