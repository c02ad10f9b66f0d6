"""What one pass through an MoE layer reports beside its output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.moe.losses import squared_cv


@dataclass(frozen=True)
class MoEStats:
    """Balance of one batch over the experts, and the losses made of it.

    Attributes:
        importance: (E,) float32 or wider. Sum of each expert's gates (eq. 6).
        load: (E,) float32 or wider. Expected number of tokens of each expert, differentiable
            (eqs. 8-10); in evaluation, and where all experts are taken, the counts themselves.
        tokens_per_expert: (E,) int64. Tokens sent to each expert.
        importance_loss: Scalar, weighted (eq. 7).
        load_loss: Scalar, weighted (eq. 11).
        threshold_loss: Scalar, trains the thresholds of strictly balanced gates (eq. 20, averaged
            over tokens); 0 with other gates and in evaluation.
    """

    importance: Tensor
    load: Tensor
    tokens_per_expert: Tensor
    importance_loss: Tensor
    load_loss: Tensor
    threshold_loss: Tensor

    @property
    def balance_loss(self) -> Tensor:
        """Weighted sum of the loss terms: one scalar to add to the loss per token."""
        return self.importance_loss + self.load_loss + self.threshold_loss


def balance_metrics(importance: Tensor, load: Tensor) -> dict[str, Tensor]:
    """Compute the columns of Table 6 from sums over any number of batches.

    Args:
        importance: (E,).
        load: (E,).

    Returns:
        `cv_importance`, `cv_load`, and `max_load`, the largest load over the mean load; scalars.

    Source: Shazeer et al. 2017, Table 6.
    """
    return {
        "cv_importance": squared_cv(importance).sqrt(),
        "cv_load": squared_cv(load).sqrt(),
        "max_load": load.max() / load.mean().clamp_min(1e-9),
    }


def effective_experts(counts: Tensor) -> Tensor:
    """Compute how many equally used experts would be as uneven as those that were used.

    Args:
        counts: (..., E) non-negative, tokens of each expert.

    Returns:
        (...): exp of the entropy of each row's shares, from 1 to E; 0 where a row has no token.
    """
    total = counts.sum(-1, keepdim=True)
    shares = counts / total.clamp_min(1e-9)
    return torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
