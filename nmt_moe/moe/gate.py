"""Gates, which choose the experts of each token and their weights.

All gates compute logits, noise, softmax and load in float32 (in float64 for float64 tokens),
regardless of the model's dtype and autocast settings. On a GPU, the logits are about as accurate as
in float32 (see `kernels.gate_logits`). All gates take the same arguments and return a `Gating`.

All gates have these attributes:
    can_balance_load: Whether the load can vary, so that there is a load loss.
    waits: Whether the host must wait for the device to find out how many slots the tokens need.
"""

import math

import torch
from torch import Tensor, nn

from nmt_moe.kernels import Gating, gate_logits, noisy_top_k, row_groups


def gate_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for computing gates: float32, or wider if `x` is."""
    return torch.promote_types(x.dtype, torch.float32)


class SoftmaxGate(nn.Module):
    """A gate that uses all experts for every token, as a dense baseline.

    Source: Shazeer et al. 2017, eq. 2.
    """

    can_balance_load = waits = False

    def __init__(self, model_dim: int, num_experts: int) -> None:
        super().__init__()
        self.gate_weight = nn.Parameter(torch.zeros(model_dim, num_experts))

    def forward(self, x: Tensor, noise: None = None, row_offsets: Tensor | None = None) -> Gating:
        """Compute the gates of all experts. See `NoisyTopKGate.forward` for the arguments."""
        num_tokens, num_experts = len(x), self.gate_weight.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            dtype = gate_dtype(x)
            gates = gate_logits(x.to(dtype), self.gate_weight.to(dtype), None)[0].softmax(dim=1)
        expert_ids = torch.arange(num_experts, device=x.device).expand(num_tokens, -1)
        counts = torch.full_like(expert_ids[:1].sum(0), num_tokens)
        if row_offsets is not None:
            gates, expert_ids = empty_padding(gates, expert_ids, num_experts, row_offsets)
            counts = row_offsets[1].expand(num_experts)
        return Gating(gates, expert_ids, gates.sum(0), counts.to(gates.dtype), counts)


class NoisyTopKGate(nn.Module):
    """A gate that keeps the k largest noisy logits and takes the softmax over them.

    Both weights start at zero, so that the noise balances the first batches (Appendix A).

    Attributes:
        gate_weight: (D, E), weights of the logits; (G, D, E) with `num_groups`.
        noise_weight: Weights for the noise scale, with the shape of `gate_weight`.

    Source: Shazeer et al. 2017, eqs. 3-5 and 8-10.
    """

    waits = False

    def __init__(self, model_dim: int, num_experts: int, top_k: int, num_groups: int = 0) -> None:
        """Build the gate.

        Args:
            model_dim: Width of tokens, D.
            num_experts: Number of experts, E.
            top_k: Number of experts per token, K.
            num_groups: Number of groups of rows, G, each with its own gate; 0 for a single gate.
        """
        super().__init__()
        self.top_k, self.can_balance_load = top_k, top_k < num_experts
        shape = weight_shape(model_dim, num_experts, num_groups)
        self.gate_weight = nn.Parameter(torch.zeros(shape))
        self.noise_weight = nn.Parameter(torch.zeros(shape))

    def forward(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        row_offsets: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Gating:
        """Choose the experts of each token.

        Args:
            x: (N, D), the tokens' vectors.
            noise: (N, E), standard normal numbers, used only during training. None to draw them.
            row_offsets: With groups, (G + 1,) int64; group g owns rows [offsets[g],
                offsets[g + 1]). Without groups, (3,) int64, [0, number of tokens, N]; the rows
                after the tokens are padding and contain zeros. None if there is no padding.
            row_weight: (N,), the weight of each row's gates in `importance`; None for ones.
        """
        dtype = gate_dtype(x)
        has_groups = self.gate_weight.dim() == 3
        with torch.autocast(x.device.type, enabled=False):
            clean, raw_scale = gate_logits(
                x.to(dtype),
                self.gate_weight.to(dtype),
                self.noise_weight.to(dtype) if self.training else None,
                row_offsets if has_groups else None,
            )
            noise = None if noise is None or not self.training else noise.to(dtype)
            gating = noisy_top_k(clean, raw_scale, self.top_k, noise, row_offsets, row_weight)
        if has_groups or row_offsets is None:
            return gating
        gates, expert_ids = empty_padding(*gating[:2], clean.shape[1], row_offsets)
        return gating.first_group()._replace(gates=gates, expert_ids=expert_ids)


class StrictlyBalancedGate(nn.Module):
    """A gate that gives each expert equally many tokens in training and uses thresholds otherwise.

    During training, each expert keeps the best m = ceil(K N / E) of N tokens. If scores are equal
    (as at the start, when the weight is zero), expert i takes m tokens, beginning at token i m and
    continuing at token 0 after the last one, so that the first batches are spread evenly. The
    thresholds are trained by `batchwise_threshold_loss`. This loss is averaged over tokens, so that
    its gradient does not grow with the batch, and it has no gradient with respect to the gate's
    weight.

    Attributes:
        gate_weight: (D, E), weights of the logits; (G, D, E) with `num_groups`.
        threshold: (E,), the probability above which an expert is chosen; (G, E) with `num_groups`.

    Source: Shazeer et al. 2017, Appendix F, eqs. 15-20.
    """

    can_balance_load, waits = False, True

    def __init__(self, model_dim: int, num_experts: int, top_k: int, num_groups: int = 0) -> None:
        """Build the gate. The arguments are the same as for `NoisyTopKGate`."""
        super().__init__()
        self.top_k = top_k
        shape = weight_shape(model_dim, num_experts, num_groups)
        self.gate_weight = nn.Parameter(torch.zeros(shape))
        # The thresholds start at the probability that each expert has while the weight is zero.
        threshold_shape = *shape[:-2], num_experts
        self.threshold = nn.Parameter(torch.full(threshold_shape, 1 / num_experts))

    def forward(
        self,
        x: Tensor,
        noise: None = None,
        row_offsets: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Gating:
        """Choose the tokens of each expert. See `NoisyTopKGate.forward` for the arguments.

        There must be no noise and no padding. With groups, each group is a separate batch.
        """
        with torch.autocast(x.device.type, enabled=False):
            dtype = gate_dtype(x)
            logits, _ = gate_logits(x.to(dtype), self.gate_weight.to(dtype), None, row_offsets)
            probs, threshold = logits.detach().softmax(dim=1), self.threshold.to(dtype)
            if row_offsets is not None:
                # Indexing sums the gradients of equal indices in a fixed order.
                threshold = threshold[row_groups(row_offsets, len(x))]
            if self.training:
                mask = batchwise_mask(probs, self.top_k, row_offsets)
                loss = batchwise_threshold_loss(probs, threshold, mask) / max(len(x), 1)
            else:
                mask, loss = over_threshold(probs, threshold), probs.new_zeros(())
            masked = masked_softmax(logits, mask)
            weighted = masked if row_weight is None else row_weight.unsqueeze(1) * masked
            importance, load = (
                values.sum(0)
                if row_offsets is None
                else torch.segment_reduce(values, "sum", offsets=row_offsets)
                for values in (weighted, mask.to(dtype))
            )
        # Both numbers are read together, so that the host waits only once.
        num_slots, num_rows = torch.stack([_most(mask), mask.sum()]).tolist()
        gates, expert_ids = to_slots(masked, mask, max(num_slots, 1))
        return Gating(gates, expert_ids, importance, load, load.long(), loss, num_rows)


def weight_shape(model_dim: int, num_experts: int, num_groups: int) -> tuple[int, ...]:
    """Return the shape of a gate's weight, or of the stacked weights of one gate per group."""
    return (num_groups, model_dim, num_experts) if num_groups else (model_dim, num_experts)


def empty_padding(
    gates: Tensor, expert_ids: Tensor, num_experts: int, row_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Empty the slots, (N, K), of padding rows, which start at row `row_offsets[1]`."""
    is_padding = torch.arange(len(gates), device=gates.device) >= row_offsets[1]
    is_padding = is_padding.unsqueeze(1)
    return gates.masked_fill(is_padding, 0.0), expert_ids.masked_fill(is_padding, num_experts)


def batchwise_mask(probs: Tensor, top_k: int, row_offsets: Tensor | None = None) -> Tensor:
    """Keep each expert's best m = ceil(K N / E) tokens.

    Args:
        probs: (N, E), the softmax of each row's logits, G_sigma.
        top_k: Average number of experts per token, K.
        row_offsets: (G + 1,) int64. Each group g, with rows [offsets[g], offsets[g + 1]), is a
            separate batch; None for a single batch.

    Returns:
        (N, E) bool, with exactly m True values in each column of a group.

    Source: Shazeer et al. 2017, eq. 18.
    """
    num_rows, num_experts = probs.shape
    if row_offsets is None:
        row_offsets = torch.tensor([0, num_rows], device=probs.device)
    sizes = row_offsets.diff()
    chosen_per_expert = (top_k * sizes + num_experts - 1) // num_experts
    groups = row_groups(row_offsets, num_rows)
    first, size, chosen = row_offsets[groups], sizes[groups], chosen_per_expert[groups]
    index = torch.arange(num_rows, device=probs.device) - first  # index within the group
    start = torch.arange(num_experts, device=probs.device) * chosen.unsqueeze(1)
    # The column of expert i starts at token i m of its group.
    token = first.unsqueeze(1) + (index.unsqueeze(1) + start) % size.unsqueeze(1)
    order = probs.detach().gather(0, token).sort(dim=0, descending=True, stable=True).indices
    if len(sizes) > 1:
        order = order.gather(0, groups[order].sort(dim=0, stable=True).indices)
    is_best = (index < chosen).unsqueeze(1).expand_as(token)
    return torch.zeros_like(is_best).scatter(0, token.gather(0, order), is_best)


def over_threshold(probs: Tensor, threshold: Tensor) -> Tensor:
    """Choose experts that have a probability above their threshold.

    NaN is also chosen, so that it shows in the gates.

    Args:
        probs: (N, E), the softmax of each row's logits, G_sigma.
        threshold: (E,), the threshold of each expert; (N, E) if rows belong to different gates.

    Returns:
        (N, E) bool, True for a chosen expert.

    Source: Shazeer et al. 2017, eq. 19.
    """
    return ~(probs <= threshold)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute G(x)_i = G_sigma(x)_i M_i / sum_j G_sigma(x)_j M_j, or 0 for tokens without experts.

    The gates are computed as a softmax over the logits of the chosen experts, because all G_sigma
    of these experts may underflow.

    Args:
        logits: (N, E), gate logits.
        mask: (N, E) bool, True for a chosen expert.

    Returns:
        (N, E), the gates.

    Source: Shazeer et al. 2017, eqs. 2 and 16.
    """
    # Leaving out all columns of a row would give NaN, so such rows are masked only afterwards.
    left_out = ~mask & mask.any(dim=1, keepdim=True)
    return logits.masked_fill(left_out, -math.inf).softmax(dim=1).masked_fill(~mask, 0.0)


def batchwise_threshold_loss(probs: Tensor, threshold: Tensor, mask: Tensor) -> Tensor:
    """Penalise thresholds that do not choose the same tokens as the batchwise mask.

    Args:
        probs: (N, E), the softmax of each row's logits, G_sigma; X in the paper.
        threshold: (E,), the threshold of each expert; T in the paper.
        mask: (N, E) bool, the batchwise mask.

    Returns:
        A scalar, summed over tokens and experts. It is 0 if the thresholds and the mask choose the
        same tokens, and positive otherwise.

    Source: Shazeer et al. 2017, eqs. 19-20.
    """
    over = probs > threshold
    return ((over.to(probs.dtype) - mask.to(probs.dtype)) * (probs - threshold)).sum()


def to_slots(dense: Tensor, mask: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """List each token's experts.

    Args:
        dense: (N, E), the gates; 0 where `mask` is False.
        mask: (N, E) bool, True for a chosen expert.
        num_slots: Largest number of experts of any token, K.

    Returns:
        (N, K) gates and (N, K) int64 ids in ascending order. Empty slots have the gate 0 and the id
        E.
    """
    ids = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :num_slots]
    return dense.gather(1, ids), ids.masked_fill(~mask.gather(1, ids), mask.shape[1])


def _most(mask: Tensor) -> Tensor:
    """Return the largest number of experts of any token, or 0 if there are no tokens."""
    return mask.sum(1).max() if len(mask) else mask.sum()
