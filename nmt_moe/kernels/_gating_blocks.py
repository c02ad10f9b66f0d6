"""Noisy top-k gating on the CPU, in blocks of rows that stay in the cache.

The backward pass is written by hand. The only (N, E) tensors kept for it are the logits. The k + 1
largest noisy logits of each row, which include the thresholds, are also kept, with their noise.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.kernels._backend import row_groups
from nmt_moe.kernels.reference import NOISE_FLOOR

# Number of values in a block. Four buffers of this many float32 values fit into an L2 cache of
# 2 MB. With a power of two, torch draws the same noise block by block as in one call.
BLOCK_NUMBERS = 1 << 17
# Rows with at least WIDE columns are searched in two steps, starting with the maxima of runs of RUN
# columns.
WIDE, RUN = 512, 32
# For blocks of at most this many values, as in a decoding step, sorting is faster than searching.
FEW_NUMBERS = 1 << 11

# Phi(-10) = 8e-24 is too small to change any sum. For larger margins, exp and erfc underflow and
# run ten times slower.
MAX_MARGIN = 10.0

INV_SQRT_2 = 1 / math.sqrt(2)
INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


class Block(NamedTuple):
    """Rows that are processed together.

    Attributes:
        rows: Slice of these rows.
        runs: For each group with rows in the block, the group and the slice of its rows, counted
            from the block's first row.
    """

    rows: slice
    runs: list[tuple[int, slice]]


def blocks(bounds: list[int], num_columns: int) -> Iterator[Block]:
    """Divide rows into blocks. Group g owns rows [bounds[g], bounds[g + 1])."""
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
    """Find the largest scores of each row. The lowest indices win ties.

    Args:
        scores: (B, E), the scores to search.
        count: Number of scores to find in each row, at most E.

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
    # The `count` largest scores are all in the `count` runs with the largest maxima. These runs are
    # sorted in ascending order, so that the lowest indices still win ties.
    by_run = scores.view(len(scores), width // RUN, RUN)
    runs = _largest_ids(by_run.amax(2), count).sort(dim=1).values
    candidates = by_run.gather(1, runs.unsqueeze(2).expand(-1, -1, RUN)).flatten(1)
    best = _largest_ids(candidates, count)
    ids = runs.gather(1, best.div(RUN, rounding_mode="floor")) * RUN + best % RUN
    return candidates.gather(1, best), ids


def _largest_ids(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the largest float32 scores.

    The upper half of a 64-bit key contains the score's bits, rearranged to compare as integers; the
    lower half contains the index, counted backwards. All keys therefore differ, and plain
    vectorised maxima find them in order. NaN of either sign counts as infinity, so that it is
    chosen and appears in the result.
    """
    last = scores.shape[1] - 1
    numbers = scores.nan_to_num(math.inf, math.inf, -math.inf)
    bits = numbers.add_(0.0).view(torch.int32)  # -0 becomes 0, because the two are equal
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

    The threshold of a chosen expert is the (k+1)-th largest noisy logit. The threshold of any other
    expert is the k-th largest.

    Args:
        clean: (B, E), logits without noise.
        scale: (B, E), standard deviation of the noise.
        top: (B, K + 1), the largest noisy logits, in descending order.
        ids: (B, K + 1) int64, the indices of these logits.
        out: (B, E), the tensor to write the result to.

    Returns:
        `out`.
    """
    chosen = ids[:, :-1]
    # A logit of -inf does not exceed a threshold of -inf, and inf - inf would give NaN.
    thresholds = top[:, -2:].clamp_min(torch.finfo(top.dtype).min)
    torch.sub(clean, thresholds[:, :1], out=out)
    threshold = torch.where(is_inside(top), thresholds[:, 1:], thresholds[:, :1])
    out.scatter_(1, chosen, clean.gather(1, chosen) - threshold)
    return out.div_(scale).clamp_(-MAX_MARGIN, MAX_MARGIN)


def is_inside(top: Tensor) -> Tensor:
    """Return (B, K) bool, True for chosen logits that strictly exceed the (k+1)-th largest."""
    return top[:, :-1] > top[:, -1:]


class BlockedNoisyTopK(torch.autograd.Function):
    """The CPU implementation of `kernels.noisy_top_k`.

    Its results are the first fields of `Gating`. Sums always have the shape (G, E).
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
        # Backward pass through the softmax, to the largest noisy logits.
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
    """Run the backward pass of the load estimate, and add the thresholds' gradients to `grad_top`.

    If z = (clean - threshold) / scale and w = grad_load phi(z) / scale, the gradients of `clean`,
    the threshold and the scale are w, -w and -w z.

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
        torch.sigmoid(raw_scale[rows], out=scale)  # the derivative of softplus
        torch.mul(w, z, out=by_scale).mul_(scale).neg_()
        inside = (w.gather(1, ids[rows, :-1]) * is_inside(top[rows])).sum(1)
        grad_top[rows, -1].sub_(inside)
        grad_top[rows, -2].add_(inside).sub_(w.sum(1))
    return grad_clean, grad_raw


def _buffers(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three (B, E) buffers for blocks of the (N, E) logits."""
    num_rows, width = clean.shape
    height = min(max(BLOCK_NUMBERS // width, 1), num_rows)
    first, second, third = clean.new_empty(3, height, width)
    return first, second, third


def _sum_by_expert(bins: Tensor, gates: Tensor, row_weight: Tensor | None, like: Tensor) -> Tensor:
    """Add up the gates of each (group, expert) pair, one after another, in float64."""
    if row_weight is not None:
        gates = gates * row_weight.unsqueeze(1)
    total = torch.zeros(like.numel(), dtype=torch.float64)
    total.index_add_(0, bins.flatten(), gates.double().flatten())
    return total.to(like.dtype).view_as(like)
