"""Noisy top-k gating: compute gates, importance and load from logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.checks import check_range, check_shape
from nmt_moe.kernels import reference
from nmt_moe.kernels._backend import is_on_host, uses_triton
from nmt_moe.kernels._gating_blocks import BlockedNoisyTopK
from nmt_moe.kernels.reference import NOISE_FLOOR, Gating

# Limits of the Triton kernels: the maximum number of experts, and the maximum number of logits
# (k + 1) that they search for in each row.
MAX_TRITON_EXPERTS, MAX_TRITON_TOP = 16384, 16


def noisy_top_k(
    clean: Tensor,
    raw_scale: Tensor | None,
    top_k: int,
    noise: Tensor | None = None,
    row_offsets: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Gating:
    """Keep the k largest noisy logits of each row, and take the softmax over them.

    The noise has the standard deviation softplus(raw_scale) + NOISE_FLOOR. P(x, i) is the
    probability that expert i is among the k largest if only its own noise is drawn again; gradients
    pass through the thresholds. Sums run in a fixed order, so equal inputs (and equal states of
    the device's random generator, which determines the noise) give bit-identical results.

    On a GPU, the kernels handle float32, up to 16384 experts and `top_k` below 16. In all other
    cases, the GPU runs plain torch, with full (N, E) tensors and noise from its own generator.

    Args:
        clean: (N, E) float32 or float64, logits without noise.
        raw_scale: (N, E), logits of the noise's standard deviation; None for no noise (evaluation).
        top_k: Number of experts per row, K, from 1 to E.
        noise: (N, E), standard normal numbers; ignored without `raw_scale`. If None, they are drawn
            at random.
        row_offsets: (G + 1,) int64. Sums are computed separately for each group. Group g owns rows
            [offsets[g], offsets[g + 1]). If None, sums run over all rows.
        row_weight: (N,), the weight of each row's gates in `importance`; None for ones.

    Returns:
        The chosen experts; the sums have the shape (E,), or (G, E) with `row_offsets`.

    Raises:
        ValueError: if shapes do not match or `top_k` is out of range.

    Source: Shazeer et al. 2017, eqs. 3-6 and 8-10.
    """
    num_rows, num_experts = clean.shape
    check_range("top_k", top_k, 1, num_experts)
    for name, tensor in (("raw_scale", raw_scale), ("noise", noise)):
        if tensor is not None:
            check_shape(name, tensor, (num_rows, num_experts), "(N, E)")
    if row_weight is not None:
        check_shape("row_weight", row_weight, (num_rows,), "(N,)")
    if row_offsets is not None:
        check_shape("row_offsets", row_offsets, (None,), "(G + 1,)")
    run = _implementation(clean, top_k)
    if run is None:
        return reference.noisy_top_k(clean, raw_scale, top_k, noise, row_offsets, row_weight)
    offsets = row_offsets
    if offsets is None:
        offsets = torch.tensor([0, num_rows]) if is_on_host(clean) else _all_rows(clean)
    gating = Gating(*run.apply(clean, raw_scale, noise, row_weight, offsets, top_k))
    if row_offsets is not None:
        return gating
    return gating.first_group()


def _implementation(clean: Tensor, top_k: int) -> type[torch.autograd.Function] | None:
    """Choose an implementation by device, dtype and shape; return None for plain torch."""
    fits = clean.shape[1] <= MAX_TRITON_EXPERTS and top_k < MAX_TRITON_TOP
    fits = fits and len(clean) > 0 and clean.dtype == torch.float32
    if fits and uses_triton(clean, "gating"):
        return _TritonNoisyTopK
    return BlockedNoisyTopK if is_on_host(clean) else None


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, (1,) int64, from the generator of `device`.

    The seed stays on the device, so that each replay of a CUDA graph draws a different one.
    """
    return torch.randint(2**63 - 1, (1,), device=device)


class _TritonNoisyTopK(torch.autograd.Function):
    """The Triton path of `noisy_top_k`, in float32. Its results are the first fields of `Gating`.

    Sums always have the shape (G, E).
    """

    @staticmethod
    def forward(
        ctx: Any,
        clean: Tensor,
        raw_scale: Tensor | None,
        noise: Tensor | None,
        row_weight: Tensor | None,
        row_offsets: Tensor,
        top_k: int,
    ) -> tuple[Tensor, ...]:
        from nmt_moe.kernels._triton.gating import gating_forward

        draws = raw_scale is not None and noise is None
        seed = draw_seed(clean.device) if draws else None
        inputs = clean, raw_scale, noise, seed, row_weight, row_offsets
        choice = gating_forward(*inputs, top_k, NOISE_FLOOR)
        saved = clean, raw_scale, row_weight, row_offsets
        ctx.save_for_backward(*saved, choice.gates, choice.top, choice.ids)
        ctx.smooth = raw_scale is not None and top_k < clean.shape[1]
        ctx.set_materialize_grads(False)
        expert_ids = choice.ids[:, :top_k].long()
        load = choice.load if ctx.smooth else choice.counts.to(clean.dtype)
        fixed = (expert_ids, choice.counts) if ctx.smooth else (expert_ids, choice.counts, load)
        ctx.mark_non_differentiable(*fixed)
        return choice.gates, expert_ids, choice.importance, load, choice.counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_gates: Tensor | None,
        _grad_ids: None,
        grad_importance: Tensor | None,
        grad_load: Tensor | None,
        _grad_counts: None,
    ) -> tuple[Tensor | None, ...]:
        from nmt_moe.kernels._triton.gating import gating_backward

        clean, raw_scale, row_weight, row_offsets, *choice = ctx.saved_tensors
        inputs = clean, raw_scale, row_weight, row_offsets
        grads = grad_gates, grad_importance, grad_load if ctx.smooth else None
        grad_clean, grad_raw, grad_weight = gating_backward(*inputs, choice, grads, NOISE_FLOOR)
        return grad_clean, grad_raw, None, grad_weight, None, None


def _all_rows(clean: Tensor) -> Tensor:
    """Return the offsets of a single group that has rows, without waiting for the device."""
    return torch.arange(0, len(clean) + 1, len(clean), device=clean.device)
