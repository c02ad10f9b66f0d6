"""The backward pass of noisy top-k gating."""

import triton
import triton.language as tl

from nmt_moe.kernels._triton.gating_parts import (
    find_inside,
    gate_dot,
    margins,
    normal_density,
    read_noise,
    read_seed,
    softplus,
    spread_gradient,
)
from nmt_moe.kernels._triton.hints import whole


@triton.jit
def _load_slope(
    clean,
    raw_scale,
    top,
    ids,
    grad_load,
    group_start,
    rows,
    row_mask,
    columns,
    num_experts,
    TOP_K: tl.constexpr,
    NOISE_FLOOR: tl.constexpr,
):
    """Compute the load's derivative with respect to the clean logits, the margins, and `inside`.

    Each result has the shape (B, W). If d is the derivative with respect to an expert's clean
    logit, the derivative with respect to its threshold is -d, and the derivative with respect to
    the noise scale is -d times the margin.
    """
    offsets = rows[:, None] * num_experts + columns[None, :]
    mask = row_mask[:, None] & (columns < num_experts)[None, :]
    logits = tl.load(clean + offsets, mask, other=0.0)
    scale = softplus(tl.load(raw_scale + offsets, mask, other=0.0)) + NOISE_FLOOR
    inside = find_inside(top, ids, rows, row_mask, columns, TOP_K)
    z = margins(logits, scale, inside, top, rows, row_mask, TOP_K)
    weight = tl.load(grad_load + group_start + columns, columns < num_experts, other=0.0)
    slope = weight[None, :] * normal_density(z) / scale
    slope = tl.where(mask, slope, 0.0)
    # If the margin is infinite, the slope is 0. Replace the margin by 0, so that the product of the
    # two is not NaN.
    return slope, tl.where(slope == 0, 0.0, z), inside


@triton.jit
def _threshold_sums(slope, inside):
    """Sum the slopes of the experts in `inside`, and the slopes of all others: (B,) each."""
    return tl.sum(tl.where(inside, slope, 0.0), 1), tl.sum(tl.where(inside, 0.0, slope), 1)


@triton.jit(do_not_specialize=["splits"])
def backward_kernel(
    clean,
    raw_scale,
    noise,
    row_weight,
    row_offsets,
    gates,
    top,
    ids,
    grad_gates,
    grad_importance,
    grad_load,
    grad_clean,
    grad_raw,
    grad_weight,
    seed,
    num_experts,
    splits,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
    NOISE_FLOOR: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Run the backward pass.

    Rows wider than a block are read twice: first for the thresholds, then for everything else.
    """
    number = read_seed(seed)
    num_experts = whole(num_experts, MULTIPLE)
    program = tl.program_id(0).to(tl.int64)
    group = program // splits
    start, end = tl.load(row_offsets + group), tl.load(row_offsets + group + 1)
    group_start = group * num_experts
    for first in range(start + program % splits * BLOCK_ROWS, end, splits * BLOCK_ROWS):
        rows = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < end
        weight = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
        if row_weight is not None:
            weight = tl.load(row_weight + rows, row_mask, other=0.0)
        dot, through_dot = gate_dot(
            gates,
            grad_gates,
            grad_importance,
            group_start,
            weight,
            ids,
            rows,
            row_mask,
            TOP_K,
            COUNT,
        )
        if row_weight is not None:
            tl.store(grad_weight + rows, through_dot, row_mask)
        inside_sum, outside_sum = weight * 0.0, weight * 0.0
        if CHUNKS > 1 and grad_load is not None:
            for chunk in range(CHUNKS):
                columns = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
                slope, _, inside = _load_slope(
                    clean,
                    raw_scale,
                    top,
                    ids,
                    grad_load,
                    group_start,
                    rows,
                    row_mask,
                    columns,
                    num_experts,
                    TOP_K,
                    NOISE_FLOOR,
                )
                inside_part, outside_part = _threshold_sums(slope, inside)
                inside_sum += inside_part
                outside_sum += outside_part
        for chunk in range(CHUNKS):
            columns = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            offsets = rows[:, None] * num_experts + columns[None, :]
            mask = row_mask[:, None] & (columns < num_experts)[None, :]
            slope, z = 0.0, 0.0
            if grad_load is not None:
                slope, z, inside = _load_slope(
                    clean,
                    raw_scale,
                    top,
                    ids,
                    grad_load,
                    group_start,
                    rows,
                    row_mask,
                    columns,
                    num_experts,
                    TOP_K,
                    NOISE_FLOOR,
                )
                if CHUNKS == 1:
                    inside_sum, outside_sum = _threshold_sums(slope, inside)
            from_top = spread_gradient(
                gates,
                grad_gates,
                grad_importance,
                group_start,
                weight,
                dot,
                inside_sum,
                outside_sum,
                ids,
                rows,
                row_mask,
                columns,
                TOP_K,
                COUNT,
            )
            tl.store(grad_clean + offsets, from_top + slope, mask)
            if raw_scale is not None:
                drawn = read_noise(
                    noise,
                    number,
                    rows,
                    chunk * BLOCK_COLUMNS,
                    offsets,
                    mask,
                    BLOCK_ROWS,
                    BLOCK_COLUMNS,
                )
                raw = tl.load(raw_scale + offsets, mask, other=0.0)
                by_scale = from_top * drawn - slope * z
                tl.store(grad_raw + offsets, by_scale * tl.sigmoid(raw), mask)
