"""The statistics that an MoE layer returns in addition to its output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.checks import check_finite
from nmt_moe.kernels import Gating
from nmt_moe.moe.losses import squared_cv
from nmt_moe.moe.padding import Unpadded


@dataclass(frozen=True)
class MoEStats:
    """The experts that a gate chose in one batch, their balance, and the balance losses.

    Attributes:
        gating: The result of the gate, for the rows in `rows` only.
        rows: The rows of the batch that the gate received.
        num_rows: Number of rows of the batch, N, including padding.
        importance_loss: Scalar, the weighted importance loss (eq. 7).
        load_loss: Scalar, the weighted load loss (eq. 11).
        name: Name of the layer for error messages.
    """

    gating: Gating
    rows: Unpadded
    num_rows: int
    importance_loss: Tensor
    load_loss: Tensor
    name: str

    @property
    def expert_ids(self) -> Tensor:
        """Return the experts of each token, (N, K) int64, with E in empty slots and for padding."""
        num_experts = len(self.importance)
        return self.rows.put_back(self.gating.expert_ids, self.num_rows, num_experts)

    @property
    def gates(self) -> Tensor:
        """Return the weights of `expert_ids`, (N, K) float32 or wider, with 0 in empty slots."""
        return self.rows.put_back(self.gating.gates, self.num_rows)

    @property
    def importance(self) -> Tensor:
        """Return the sum of each expert's gates (eq. 6), (E,) float32 or wider."""
        return self.gating.importance

    @property
    def load(self) -> Tensor:
        """Return each expert's expected number of tokens, (E,) float32 or wider (see `Gating`)."""
        return self.gating.load

    @property
    def tokens_per_expert(self) -> Tensor:
        """Return the number of tokens sent to each expert, (E,) int64."""
        return self.gating.tokens_per_expert

    @property
    def threshold_loss(self) -> Tensor:
        """Return the loss for the thresholds of a strictly balanced gate, averaged over tokens.

        It is 0 with other gates and in evaluation.

        Source: Shazeer et al. 2017, eq. 20.
        """
        loss = self.gating.threshold_loss
        return self.importance.new_zeros(()) if loss is None else loss

    @property
    def balance_loss(self) -> Tensor:
        """Return the sum of the weighted losses, a scalar to add to the mean loss per token."""
        return self.importance_loss + self.load_loss + self.threshold_loss

    def check_finite(self) -> None:
        """Reject tokens that are not finite, and gate weights that make a gate NaN.

        An infinite gate weight is accepted if it gives only logits of -inf. The experts with these
        logits are not chosen unless a token has fewer than K other experts, and then their gate is
        0. This method waits for the device.

        Raises:
            FloatingPointError: if a gate is not finite. The message names the layer.
        """
        # A token that is not finite gives a logit of NaN or +inf, or only logits of -inf. In all of
        # these cases, the softmax is NaN, and so is the importance.
        check_finite(f"the tokens or gate weights of the {self.name}", self.importance)


def balance_metrics(importance: Tensor, load: Tensor) -> dict[str, Tensor]:
    """Compute the columns of Table 6 from sums over any number of batches.

    Args:
        importance: (E,), the sum of each expert's gates.
        load: (E,), the number of tokens per expert, either counted or estimated smoothly.

    Returns:
        The scalars `cv_importance` and `cv_load`, the coefficients of variation, and `max_load`,
        the largest load divided by the mean load.

    Source: Shazeer et al. 2017, Table 6.
    """
    return {
        "cv_importance": squared_cv(importance).sqrt(),
        "cv_load": squared_cv(load).sqrt(),
        "max_load": load.max() / load.mean().clamp_min(1e-9),
    }


def effective_experts(counts: Tensor) -> Tensor:
    """Compute the effective number of experts.

    This is the number of equally used experts that would give the same entropy.

    Args:
        counts: (..., E), non-negative, the number of tokens per expert.

    Returns:
        (...), the exponential of the entropy of each row's shares, from 1 to E; 0 for a row without
        tokens.
    """
    total = counts.sum(-1, keepdim=True)
    shares = counts / total.clamp_min(1e-9)
    return torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
