"""Attention of the decoder over the encoder's outputs."""

import torch
from torch import Tensor, nn

ATTENTIONS = ("product", "additive")


class AttentionKeys(nn.Module):
    """The source side of the attention, computed once per sentence: x U, or tanh(x U).

    Source: Shazeer et al. 2017, Appendix G, eqs. 21 ("additive") and 22 ("product").
    """

    def __init__(self, model_dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.projection = nn.Linear(model_dim, model_dim, bias=False)  # U

    def forward(self, source: Tensor) -> Tensor:
        """Map the encoder's outputs to keys: (B, S, D) to (B, S, D)."""
        keys = self.projection(source)
        return torch.tanh(keys) if self.kind == "product" else keys


class Attention(nn.Module):
    """Weigh source positions by a query; needs the keys of `AttentionKeys`.

    The product form is one matrix product over all source and target steps at once. V starts at
    1 / sqrt(D): drawn like a matrix, all weights would start equal; starting at 1, scores reach
    +-D as soon as the tanh saturate, and at a high learning rate the weights settle for good on
    one position (the end of the sentence) before attention is learnt.

    Source: Shazeer et al. 2017, Appendix G, eqs. 21 ("additive") and 22 ("product").
    """

    def __init__(self, model_dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.projection = nn.Linear(model_dim, model_dim, bias=False)  # W
        self.scale = nn.Parameter(torch.full((model_dim,), model_dim**-0.5))  # V

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
        query = self.projection(query)
        if self.kind == "product":
            scores = torch.bmm(torch.tanh(query) * self.scale, keys.transpose(1, 2))
        else:
            scores = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) @ self.scale
        scores = scores.masked_fill(padding_mask.unsqueeze(1), float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=2, dtype=wide).to(source.dtype)
        return torch.bmm(weights, source), weights
