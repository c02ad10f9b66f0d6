"""Noisy top-k gating on the CPU, in blocks of rows that stay in the cache.

The backward pass is written by hand. Only the logits are kept in full size (N, E): beyond them, the
backward pass needs only the k + 1 largest of each row, which are the thresholds, and their noise.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.kernels._backend import row_groups
from nmt_moe.kernels.reference import NOISE_FLOOR

# Four buffers of this many float32 numbers fit into an L2 cache of 2 MB. It is a power of two, so
# that torch draws the same noise in blocks as at once.
BLOCK_NUMBERS = 1 << 17
# Rows at least this wide are searched in two steps, runs of columns first.
WIDE, RUN = 512, 32
# Up to this many numbers, as in a decoding step, sorting is faster than searching.
FEW_NUMBERS = 1 << 11

# Phi(-10) = 8e-24 is 0 in any sum; farther out, exp and erfc underflow and run ten times slower.
MAX_MARGIN = 10.0

INV_SQRT_2 = 1 / math.sqrt(2)
INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


class Block(NamedTuple):
    """Rows processed at a time, and which of them (counted from the first) are in which group."""

    rows: slice
    runs: list[tuple[int, slice]]


def blocks(bounds: list[int], num_columns: int) -> Iterator[Block]:
    """Divide rows into blocks; group g owns rows [bounds[g], bounds[g + 1])."""
    height = max(BLOCK_NUMBERS // num_columns, 1)
    group = 0
    for start in range(0, bounds[-1], height):
        end = min(start + height, bounds[-1])
        runs, low = [], start
        while low < end:
            high = min(bounds[group + 1], end)
            if high > low:
                runs.append((group, slice(low - start, high - start)))
                low = high
            group += low == bounds[group + 1] and low < bounds[-1]
        yield Block(slice(start, end), runs)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the largest scores of each row; lower indices win ties.

    Args:
        scores: (B, E) numbers to search.
        count: Number of scores to find, at most E.

    Returns:
        (B, count) values in descending order, and (B, count) int64 indices.
    """
    width = scores.shape[1]
    if scores.dtype != torch.float32 or scores.numel() <= FEW_NUMBERS:
        values, ids = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :count], ids[:, :count]
    if width < WIDE or width % RUN or count * RUN > width // 2:
        ids = _largest_ids(scores, count)
        return scores.gather(1, ids), ids
    # All largest scores are in runs whose maxima are among the largest. Candidates are taken in
    # ascending order, which preserves the order of indices.
    by_run = scores.view(len(scores), width // RUN, RUN)
    runs = _largest_ids(by_run.amax(2), count).sort(dim=1).values
    candidates = by_run.gather(1, runs.unsqueeze(2).expand(-1, -1, RUN)).flatten(1)
    best = _largest_ids(candidates, count)
    ids = runs.gather(1, best.div(RUN, rounding_mode="floor")) * RUN + best % RUN
    return candidates.gather(1, best), ids


def _largest_ids(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the largest float32 scores.

    A key holds the score's bits, arranged to compare as integers, above the index counted
    backwards: all keys differ, and plain vectorised maxima find them in order. NaN of either sign
    counts as infinity, so that it is chosen and shows.
    """
    last = scores.shape[1] - 1
    numbers = scores.nan_to_num(math.inf, math.inf, -math.inf)
    bits = numbers.add_(0.0).view(torch.int32)  # -0 becomes 0, which equals it
    bits = bits.bitwise_xor_(bits.bitwise_right_shift(31).bitwise_and_(0x7FFFFFFF))
    keys = bits.to(torch.int64).bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(last, -1, -1))
    lowest = torch.iinfo(torch.int64).min
    ids = keys.new_empty(len(scores), count)
    for slot in range(count):
        index = keys.amax(1, keepdim=True).bitwise_and_(0xFFFFFFFF).neg_().add_(last)
        ids[:, slot : slot + 1] = index
        keys.scatter_(1, index, lowest)
    return ids


def noise_scale(raw: Tensor, out: Tensor) -> Tensor:
    """Compute softplus(raw) + NOISE_FLOOR into `out`."""
    torch.ops.aten.softplus.out(raw, out=out)
    return out.add_(NOISE_FLOOR)


def margins(clean: Tensor, scale: Tensor, top: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    """Compute how far each clean logit is above its threshold, in standard deviations.

    The threshold of an expert that is not chosen is the k-th largest; that of a chosen one is the
    (k+1)-th.

    Args:
        clean: (B, E), logits without noise.
        scale: (B, E), standard deviation of the noise.
        top: (B, K + 1), the largest noisy logits, in descending order.
        ids: (B, K + 1) int64, the indices of these logits.
        out: (B, E) result, which is written and returned.
    """
    chosen = ids[:, :-1]
    torch.sub(clean, top[:, -2:-1], out=out)
    threshold = torch.where(is_inside(top), top[:, -1:], top[:, -2:-1])
    out.scatter_(1, chosen, clean.gather(1, chosen) - threshold)
    return out.div_(scale).clamp_(-MAX_MARGIN, MAX_MARGIN)


def is_inside(top: Tensor) -> Tensor:
    """Return which of the K chosen are strictly above the (k+1)-th: (B, K) bool."""
    return top[:, :-1] > top[:, -1:]


class BlockedNoisyTopK(torch.autograd.Function):
    """`kernels.noisy_top_k` with (G, E) sums; arguments and results in the same order."""

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
        num_rows, num_experts = clean.shape
        bounds = row_offsets.tolist()
        smooth = raw_scale is not None and top_k < num_experts
        count = top_k + 1 if smooth else top_k
        top, ids = clean.new_empty(num_rows, count), row_offsets.new_empty(num_rows, count)
        drawn = torch.empty_like(top)  # uninitialised without noise
        load = clean.new_zeros(len(bounds) - 1, num_experts)
        buffers = () if raw_scale is None else _buffers(clean)
        for rows, runs in blocks(bounds, num_experts):
            if raw_scale is None:
                top[rows], ids[rows] = largest(clean[rows].contiguous(), count)
                continue
            noisy, scale, block_noise = (buffer[: rows.stop - rows.start] for buffer in buffers)
            block_noise = block_noise.normal_() if noise is None else noise[rows]
            noise_scale(raw_scale[rows], out=scale)
            torch.addcmul(clean[rows], block_noise, scale, out=noisy)
            top[rows], ids[rows] = largest(noisy, count)
            drawn[rows] = block_noise.gather(1, ids[rows])
            if smooth:  # Phi(z) = erfc(-z / sqrt(2)) / 2
                z = margins(clean[rows], scale, top[rows], ids[rows], out=noisy)
                twice = z.mul_(-INV_SQRT_2).erfc_()
                for group, run in runs:
                    load[group].add_(twice[run].sum(0), alpha=0.5)
        gates, expert_ids = top[:, :top_k].softmax(1), ids[:, :top_k].contiguous()
        bins = expert_ids
        if len(load) > 1:
            bins = expert_ids + row_groups(row_offsets, num_rows).unsqueeze(1) * num_experts
        importance = _sum_by_expert(bins, gates, row_weight, load)
        counts = bins.flatten().bincount(minlength=load.numel()).view_as(load)
        ctx.save_for_backward(clean, raw_scale, row_weight, gates, top, ids, drawn, bins)
        ctx.smooth, ctx.bounds = smooth, bounds
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(expert_ids, counts)
        if not smooth:
            load = counts.to(load.dtype)
            ctx.mark_non_differentiable(expert_ids, counts, load)
        return gates, expert_ids, importance, load, counts

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
        clean, raw_scale, row_weight, gates, top, ids, drawn, bins = ctx.saved_tensors
        top_k = gates.shape[1]
        grad_weight = None
        if grad_gates is None:
            grad_gates = torch.zeros_like(gates)
        if grad_importance is not None:
            picked = grad_importance.reshape(-1).index_select(0, bins.flatten()).view_as(gates)
            if row_weight is None:
                grad_gates = grad_gates + picked
            else:
                grad_gates = torch.addcmul(grad_gates, picked, row_weight.unsqueeze(1))
                grad_weight = (picked * gates).sum(1)
        # Backward through the softmax, to the largest noisy logits.
        grad_top = torch.zeros_like(top)
        weighted = gates * grad_gates
        torch.addcmul(
            weighted, gates, weighted.sum(1, keepdim=True), value=-1, out=grad_top[:, :top_k]
        )
        if ctx.smooth and grad_load is not None and grad_load.any():
            grad_clean, grad_raw = _load_backward(
                clean, raw_scale, top, ids, grad_load, grad_top, ctx.bounds
            )
        else:
            grad_clean, grad_raw = torch.zeros_like(clean), torch.zeros_like(clean)
        grad_clean.scatter_add_(1, ids, grad_top)
        if raw_scale is None:
            return grad_clean, None, None, grad_weight, None, None
        slope = raw_scale.gather(1, ids).sigmoid_()
        grad_raw.scatter_add_(1, ids, slope.mul_(grad_top).mul_(drawn))
        return grad_clean, grad_raw, None, grad_weight, None, None


def _load_backward(
    clean: Tensor,
    raw_scale: Tensor,
    top: Tensor,
    ids: Tensor,
    grad_load: Tensor,
    grad_top: Tensor,
    bounds: list[int],
) -> tuple[Tensor, Tensor]:
    """Run the backward pass of the load estimate; add the thresholds' gradients to `grad_top`.

    With z = (clean - threshold) / scale and w = grad_load phi(z) / scale, the gradient is w for
    `clean`, -w for the threshold and -w z for the scale.

    Returns:
        (N, E) gradients of `clean` and of `raw_scale`.
    """
    grad_clean, grad_raw = torch.empty_like(clean), torch.empty_like(raw_scale)
    weights = grad_load * INV_SQRT_2PI
    buffers = _buffers(clean)
    for rows, runs in blocks(bounds, clean.shape[1]):
        z, scale, _ = (buffer[: rows.stop - rows.start] for buffer in buffers)
        noise_scale(raw_scale[rows], out=scale)
        margins(clean[rows], scale, top[rows], ids[rows], out=z)
        w, by_scale = grad_clean[rows], grad_raw[rows]
        torch.mul(z, z, out=w).mul_(-0.5).exp_().div_(scale)
        for group, run in runs:
            w[run].mul_(weights[group])
        torch.sigmoid(raw_scale[rows], out=scale)  # softplus' slope
        torch.mul(w, z, out=by_scale).mul_(scale).neg_()
        inside = (w.gather(1, ids[rows, :-1]) * is_inside(top[rows])).sum(1)
        grad_top[rows, -1].sub_(inside)
        grad_top[rows, -2].add_(inside).sub_(w.sum(1))
    return grad_clean, grad_raw


def _buffers(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three (B, E) buffers for the blocks of (N, E) logits."""
    num_rows, width = clean.shape
    height = min(max(BLOCK_NUMBERS // width, 1), num_rows)
    first, second, third = clean.new_empty(3, height, width)
    return first, second, third


def _sum_by_expert(bins: Tensor, gates: Tensor, row_weight: Tensor | None, like: Tensor) -> Tensor:
    """Add up gates by (group, expert), one after another, in float64."""
    if row_weight is not None:
        gates = gates * row_weight.unsqueeze(1)
    total = torch.zeros(like.numel(), dtype=torch.float64)
    total.index_add_(0, bins.flatten(), gates.double().flatten())
    return total.to(like.dtype).view_as(like)
