"""Flat gates: which experts a token goes to, and with what weight.

All compute logits, noise, softmax and load in float32 (or float64 for float64 tokens), whatever the
model's dtype or autocast says.
"""

import math

import torch
from torch import Tensor, nn

from nmt_moe.kernels import gate_logits, noisy_top_k, row_groups
from nmt_moe.moe.gate_output import GateOutput


def gate_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype gates are computed in: float32, or wider if `x` is."""
    return torch.promote_types(x.dtype, torch.float32)


class SoftmaxGate(nn.Module):
    """Take all experts: the dense baseline.

    Source: Shazeer et al. 2017, eq. 2.
    """

    def __init__(self, model_dim: int, num_experts: int) -> None:
        super().__init__()
        self.gate_weight = nn.Parameter(torch.zeros(model_dim, num_experts))

    def forward(self, x: Tensor, noise: None = None) -> GateOutput:
        """Weigh all experts: x (N, D). There is no noise."""
        if noise is not None:
            raise ValueError("`noise` must be None with the gate 'softmax', which draws none.")
        num_tokens, num_experts = len(x), self.gate_weight.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            dtype = gate_dtype(x)
            gates = gate_logits(x.to(dtype), self.gate_weight.to(dtype), None)[0].softmax(dim=1)
        expert_ids = torch.arange(num_experts, device=x.device).expand(num_tokens, -1)
        return GateOutput(
            gates,
            expert_ids,
            num_rows=num_tokens * num_experts,
            importance=gates.sum(0),
            load=torch.full_like(gates[0:1].sum(0), num_tokens),
            can_balance_load=False,
        )


class NoisyTopKGate(nn.Module):
    """Keep the k largest of the noisy gate logits, and softmax over what is kept.

    Both weights start at zero, so that noise alone balances the first batches (Appendix A).

    Source: Shazeer et al. 2017, eqs. 3-5 and 8-10.
    """

    def __init__(self, model_dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate_weight = nn.Parameter(torch.zeros(model_dim, num_experts))
        self.noise_weight = nn.Parameter(torch.zeros(model_dim, num_experts))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> GateOutput:
        """Choose the experts of each token.

        Args:
            x: (N, D).
            noise: (N, E) standard normal; drawn when None. Used in training only.
        """
        dtype = gate_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            clean, raw_scale = gate_logits(
                x.to(dtype),
                self.gate_weight.to(dtype),
                self.noise_weight.to(dtype) if self.training else None,
            )
            noise = None if noise is None else noise.to(dtype)
            gating = noisy_top_k(clean, raw_scale, self.top_k, noise)
        return GateOutput(
            gating.gates,
            gating.expert_ids,
            num_rows=gating.expert_ids.numel(),
            importance=gating.importance,
            load=gating.load,
            can_balance_load=self.top_k < clean.shape[1],
        )


class StrictlyBalancedGate(nn.Module):
    """Give every expert the same number of tokens in training, by threshold in evaluation.

    Of N tokens each expert takes its best m = ceil(K N / E). Equal scores (as at the start, when
    the weight is zero) go to expert i from token i m on, round the batch, so that the first batches
    spread evenly. The thresholds learn by `batchwise_threshold_loss`, averaged over tokens so that
    its gradient does not grow with the batch; it leaves the gate's weight alone.

    Source: Shazeer et al. 2017, Appendix F, eqs. 15-20.
    """

    def __init__(self, model_dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate_weight = nn.Parameter(torch.zeros(model_dim, num_experts))
        # What a gate of weight zero gives each expert.
        self.threshold = nn.Parameter(torch.full((num_experts,), 1 / num_experts))

    def forward(self, x: Tensor, noise: None = None) -> GateOutput:
        """Choose the tokens of each expert: x (N, D). There is no noise."""
        if noise is not None:
            raise ValueError("`noise` must be None with the gate 'strictly_balanced'.")
        with torch.autocast(x.device.type, enabled=False):
            dtype = gate_dtype(x)
            logits, _ = gate_logits(x.to(dtype), self.gate_weight.to(dtype), None)
            probs, threshold = logits.detach().softmax(dim=1), self.threshold.to(dtype)
            if self.training:
                mask = batchwise_mask(probs, self.top_k)
                loss = batchwise_threshold_loss(probs, threshold, mask) / max(len(x), 1)
            else:
                mask, loss = over_threshold(probs, threshold), probs.new_zeros(())
            masked = masked_softmax(logits, mask)
        gates, expert_ids = to_slots(masked, mask)
        counts = mask.sum(0)
        return GateOutput(
            gates,
            expert_ids,
            num_rows=int(counts.sum()),
            importance=masked.sum(0),
            load=counts.to(masked.dtype),
            can_balance_load=False,
            threshold_loss=loss,
        )


def batchwise_mask(probs: Tensor, top_k: int, row_offsets: Tensor | None = None) -> Tensor:
    """Keep each expert's best m = ceil(K N / E) tokens.

    Args:
        probs: (N, E). G_sigma.
        top_k: K, tokens' average number of experts.
        row_offsets: (G + 1,) int64. Each group, which owns rows [offsets[g], offsets[g + 1]), is
            a batch of its own; None for one batch.

    Returns:
        (N, E) bool with exactly m ones in each column of a group.

    Source: Shazeer et al. 2017, eq. 18.
    """
    num_rows, num_experts = probs.shape
    if row_offsets is None:
        row_offsets = torch.tensor([0, num_rows], device=probs.device)
    sizes = row_offsets.diff()
    chosen_per_expert = (top_k * sizes + num_experts - 1) // num_experts
    groups = row_groups(row_offsets, num_rows)
    first, size, chosen = row_offsets[groups], sizes[groups], chosen_per_expert[groups]
    place = torch.arange(num_rows, device=probs.device) - first
    start = torch.arange(num_experts, device=probs.device) * chosen.unsqueeze(1)
    # Column i begins at its group's token i m.
    token = first.unsqueeze(1) + (place.unsqueeze(1) + start) % size.unsqueeze(1)
    order = probs.detach().gather(0, token).sort(dim=0, descending=True, stable=True).indices
    if len(sizes) > 1:
        order = order.gather(0, groups[order].sort(dim=0, stable=True).indices)
    is_best = (place < chosen).unsqueeze(1).expand_as(token)
    return torch.zeros_like(is_best).scatter(0, token.gather(0, order), is_best)


def over_threshold(probs: Tensor, threshold: Tensor) -> Tensor:
    """Keep what is over its expert's threshold, and NaN, so that it shows in the gates.

    Args:
        probs: (N, E). G_sigma.
        threshold: (E,), or (N, E) for rows of several gates.

    Returns:
        (N, E) bool.

    Source: Shazeer et al. 2017, eq. 19.
    """
    return ~(probs <= threshold)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute G(x)_i = G_sigma(x)_i M_i / sum_j G_sigma(x)_j M_j; 0 for a token nobody takes.

    As a softmax over the kept logits alone, since all kept G_sigma may be too small for their
    dtype.

    Args:
        logits: (N, E).
        mask: (N, E) bool.

    Source: Shazeer et al. 2017, eqs. 2 and 16.
    """
    left_out = ~mask & mask.any(dim=1, keepdim=True)  # all columns of a row would give NaN
    return logits.masked_fill(left_out, -math.inf).softmax(dim=1).masked_fill(~mask, 0.0)


def batchwise_threshold_loss(probs: Tensor, threshold: Tensor, mask: Tensor) -> Tensor:
    """Penalise thresholds that choose other tokens than the batch does.

    Args:
        probs: (N, E). G_sigma, X of the paper.
        threshold: (E,). T.
        mask: (N, E) bool. What the batch chose.

    Returns:
        A scalar, summed over tokens and experts; 0 where both masks agree, else positive.

    Source: Shazeer et al. 2017, eqs. 19-20.
    """
    over = probs > threshold
    return ((over.to(probs.dtype) - mask.to(probs.dtype)) * (probs - threshold)).sum()


def to_slots(dense: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """List each token's experts in as many slots as the busiest token has, at least one.

    Args:
        dense: (N, E). Gates, 0 where `mask` is False.
        mask: (N, E) bool.

    Returns:
        (N, K) gates and (N, K) int64 ids by rising id; empty slots have the gate 0 and the id E.
    """
    num_tokens, num_experts = mask.shape
    num_slots = max(int(mask.sum(1).max()), 1) if num_tokens else 1
    ids = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :num_slots]
    return dense.gather(1, ids), ids.masked_fill(~mask.gather(1, ids), num_experts)
