"""Definitions of the operations in plain torch. The tests compare the kernels with them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.kernels.row_plan import RowPlan

# Term added to the noise's standard deviation, so that the load estimate never divides by a smaller
# value. The paper's eq. 4 does not have this term; the authors' later code uses this value.
NOISE_FLOOR = 1e-2
# A gap between a logit and its threshold that is too large for noise of any scale to bridge. Its
# square divided by the square of NOISE_FLOOR is still finite in float32.
LARGEST_GAP = 1e16


# A tuple, because module hooks such as fairseq's NanDetector look for tensors in tuples.
class Gating(NamedTuple):
    """The experts that a gate chose for each token, and sums over the tokens.

    If the tokens are divided into several groups, the sums have the shape (G, E), with one row for
    each group.

    Attributes:
        gates: (N, K) float32 or wider, the weights of the chosen experts; 0 in an empty slot. Noisy
            top-k gating sorts them in descending order.
        expert_ids: (N, K) int64, the chosen experts; E in an empty slot, because a token may use
            fewer than K experts. The lowest ids win ties.
        importance: (E,), the sum of each expert's gates (eq. 6).
        load: (E,). With a noisy gate during training, a differentiable sum over tokens of the
            probability P(x, i) that expert i is chosen (eqs. 8-10). Otherwise, and whenever all
            experts are chosen, the number of tokens of each expert.
        tokens_per_expert: (E,) int64, the number of tokens that chose each expert.
        threshold_loss: Scalar loss that trains the thresholds of strictly balanced gates (eq. 20,
            averaged over tokens); None with other gates.
        num_rows: Number of (token, expert) pairs if the host knows it; otherwise None.
    """

    gates: Tensor
    expert_ids: Tensor
    importance: Tensor
    load: Tensor
    tokens_per_expert: Tensor
    threshold_loss: Tensor | None = None
    num_rows: int | None = None

    def first_group(self) -> "Gating":
        """Return the same choice with the sums of the first group only."""
        return self._replace(
            importance=_first(self.importance),
            load=_first(self.load),
            tokens_per_expert=_first(self.tokens_per_expert),
        )


def _first(sums: Tensor) -> Tensor:
    """Return the first row of sums.

    `squeeze` is used where possible, because its gradient is a view, whereas the gradient of
    indexing is a copy.
    """
    return sums.squeeze(0) if len(sums) == 1 else sums[0]


def noisy_top_k(
    clean: Tensor,
    raw_scale: Tensor | None,
    top_k: int,
    noise: Tensor | None = None,
    row_offsets: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Gating:
    """Define `kernels.noisy_top_k`."""
    scale, noisy = None, clean
    if raw_scale is not None:
        scale = F.softplus(raw_scale) + NOISE_FLOOR
        noisy = clean + (torch.randn_like(clean) if noise is None else noise) * scale
    top, top_ids = noisy.sort(dim=1, descending=True, stable=True)
    gates, expert_ids = top[:, :top_k].softmax(dim=1), top_ids[:, :top_k]
    chosen = torch.zeros_like(clean).scatter(1, expert_ids, 1.0)
    probs = chosen
    if scale is not None and top_k < clean.shape[1]:
        # To be chosen, an expert must exceed the k-th largest of the *other* logits. This is the
        # (k+1)-th largest of all logits if the expert is now chosen, and the k-th if it is not. Any
        # finite logit exceeds a threshold of -inf, and a logit of -inf exceeds no threshold. With
        # the lowest finite number as the threshold, the results are the same without inf - inf.
        lowest = torch.finfo(top.dtype).min
        kth, next_one = (top[:, slot, None].clamp_min(lowest) for slot in (top_k - 1, top_k))
        gap = clean - torch.where(noisy > next_one, next_one, kth)
        # The gradient of an infinite gap would be 0 times infinity.
        probs = torch.special.ndtr(gap.clamp(-LARGEST_GAP, LARGEST_GAP) / scale)
    weighted = gates if row_weight is None else gates * row_weight.unsqueeze(1)
    dense = torch.zeros_like(clean).scatter(1, expert_ids, weighted)

    def sums(values: Tensor) -> Tensor:
        if row_offsets is None:
            return values.sum(0)
        bounds = row_offsets.tolist()
        return torch.stack([values[a:b].sum(0) for a, b in zip(bounds, bounds[1:], strict=False)])

    return Gating(gates, expert_ids, sums(dense), sums(probs), sums(chosen).long())


def gather_rows(x: Tensor, plan: RowPlan) -> Tensor:
    """Define `kernels.gather_rows`."""
    return x[plan.row_token]


def combine_rows(rows: Tensor, gates: Tensor | None, plan: RowPlan) -> Tensor:
    """Define `kernels.combine_rows`."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # empty slots read these zeros
    token_rows = padded[plan.token_rows]
    return (token_rows if gates is None else token_rows * gates.unsqueeze(2)).sum(1)


def mixture_ffn(
    x: Tensor, gates: Tensor, plan: RowPlan, weight_in: Tensor, weight_out: Tensor
) -> Tensor:
    """Define `kernels.mixture_ffn`."""
    rows = expert_ffn(x[plan.row_token], weight_in, weight_out, plan.offsets)
    return combine_rows(rows, gates, plan)


def grouped_gemm(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Define `kernels.grouped_gemm`."""
    bounds = expert_offsets.tolist()
    return torch.cat(
        [
            rows[start:end] @ weight[e]
            for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]
    )


def expert_ffn(
    rows: Tensor, weight_in: Tensor, weight_out: Tensor, expert_offsets: Tensor
) -> Tensor:
    """Define `kernels.expert_ffn`."""
    hidden = torch.relu(grouped_gemm(rows, weight_in, expert_offsets))
    return grouped_gemm(hidden, weight_out, expert_offsets)


def factored_adam(
    weight: Tensor,
    grad: Tensor,
    row_mean: Tensor,
    column_mean: Tensor,
    *,
    step: int,
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define `kernels.factored_adam`, but return the new weights, row means and column means."""
    row_mean = beta2 * row_mean + (1 - beta2) * grad.square().mean(2)  # (E, D)
    column_mean = beta2 * column_mean + (1 - beta2) * grad.square().mean(1)  # (E, H)
    total = row_mean.mean(1)[:, None, None]
    outer = row_mean[:, :, None] * column_mean[:, None, :]
    moment = torch.where(total > 0, outer / total, 0.0)
    step_size = lr * (1 - beta2**step) ** 0.5
    decayed = weight - lr * weight_decay * weight
    return decayed - step_size * grad / (moment.sqrt() + eps), row_mean, column_mean
