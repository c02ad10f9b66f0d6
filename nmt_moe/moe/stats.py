"""What one pass through an MoE layer reports besides its output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.checks import check_finite
from nmt_moe.kernels import Gating
from nmt_moe.moe.losses import squared_cv
from nmt_moe.moe.padding import Unpadded


@dataclass(frozen=True)
class MoEStats:
    """What the gate chose in one batch, its balance, and the losses made of it.

    Attributes:
        gating: What the gate chose, for the rows of `rows`.
        rows: Which rows of the batch were given to the gate.
        num_rows: N, rows of the batch, padding included.
        importance_loss: Scalar, weighted (eq. 7).
        load_loss: Scalar, weighted (eq. 11).
        name: What errors call the layer.
    """

    gating: Gating
    rows: Unpadded
    num_rows: int
    importance_loss: Tensor
    load_loss: Tensor
    name: str

    @property
    def expert_ids(self) -> Tensor:
        """(N, K) int64. The experts of each token; E in empty slots and for padding."""
        num_experts = len(self.importance)
        return self.rows.put_back(self.gating.expert_ids, self.num_rows, num_experts)

    @property
    def gates(self) -> Tensor:
        """(N, K) float32 or wider. The weights of `expert_ids`; 0 in empty slots."""
        return self.rows.put_back(self.gating.gates, self.num_rows)

    @property
    def importance(self) -> Tensor:
        """(E,) float32 or wider. Sum of each expert's gates (eq. 6)."""
        return self.gating.importance

    @property
    def load(self) -> Tensor:
        """(E,) float32 or wider. Expected number of tokens of each expert (see `Gating`)."""
        return self.gating.load

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int64. Tokens sent to each expert."""
        return self.gating.tokens_per_expert

    @property
    def threshold_loss(self) -> Tensor:
        """Scalar, trains the thresholds of strictly balanced gates (eq. 20, the mean over tokens).

        0 with other gates and in evaluation.
        """
        loss = self.gating.threshold_loss
        return self.importance.new_zeros(()) if loss is None else loss

    @property
    def balance_loss(self) -> Tensor:
        """Weighted sum of the loss terms: one scalar to add to the loss per token."""
        return self.importance_loss + self.load_loss + self.threshold_loss

    def check_finite(self) -> None:
        """Reject tokens and gate weights that are not finite; waits for their device.

        Raises:
            FloatingPointError: naming the layer.
        """
        # Whatever is not finite in a token or in a gate's weight shows in its gates, hence here.
        check_finite(f"the tokens or gate weights of the {self.name}", self.importance)


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
