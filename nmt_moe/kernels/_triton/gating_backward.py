"""The backward pass of noisy top-k gating."""

import triton
import triton.language as tl

from nmt_moe.kernels._triton.gating_parts import (
    fast_divide,
    noise_scale,
    normal_density,
    read_slots,
    thresholds,
)
from nmt_moe.kernels._triton.hints import whole


@triton.jit
def _load_slope(logits, raw, limit, weight, NOISE_FLOOR: tl.constexpr):
    """Differentiate `weight` times the load estimate.

    If d is the derivative with respect to the clean logit, the derivative with respect to the
    threshold is -d.

    Args:
        logits: Clean logits.
        raw: Logits of the noise scale.
        limit: Threshold that a noisy logit must exceed.
        weight: Gradient of the load.
        NOISE_FLOOR: Constant added to the noise scale.

    Returns:
        The derivatives with respect to the logits and to the noise scale, the noise scale, and its
        derivative with respect to `raw`, all in the shape of the arguments.
    """
    scale, by_raw = noise_scale(raw, NOISE_FLOOR)
    z = fast_divide(logits - limit, scale)
    slope = fast_divide(weight * normal_density(z), scale)
    # If the margin is infinite, the slope is 0, but the product of the two would be NaN.
    return slope, tl.where(slope == 0, 0.0, -slope * z), scale, by_raw


@triton.jit
def _softmax_gradient(
    gates,
    grad_gates,
    grad_importance,
    row_weight,
    grad_weight,
    experts,
    rows,
    row_mask,
    slots,
    TOP_K: tl.constexpr,
):
    """Compute the gradients of the largest noisy logits through the gates and the importance.

    Also store the gradient of the rows' weights.

    Args:
        gates: (N, K), the gates.
        grad_gates: (N, K), gradient of the gates, or None.
        grad_importance: (G, E), gradient of the importance, or None.
        row_weight: (N,), weights of the rows, or None.
        grad_weight: (N,), where their gradients are stored, or None.
        experts: (B, SLOTS), the positions in `grad_importance` of the experts in the slots.
        rows: (B,), row numbers.
        row_mask: (B,) bool, True for a row that exists.
        slots: (1, SLOTS), slot numbers.
        TOP_K: Number of experts per row, K.

    Returns:
        (B, SLOTS), the gradients; 0 in slots K and higher.
    """
    weights = read_slots(gates, rows, row_mask, slots, TOP_K)
    grad, through = weights * 0.0, weights * 0.0
    if grad_gates is not None:
        grad = read_slots(grad_gates, rows, row_mask, slots, TOP_K)
    if grad_importance is not None:
        chosen = row_mask[:, None] & (slots < TOP_K)
        through = tl.load(grad_importance + experts, chosen, other=0.0)
    if row_weight is None:
        grad += through
    else:
        tl.store(grad_weight + rows, tl.sum(weights * through, 1), row_mask)
        grad += through * tl.load(row_weight + rows, row_mask, other=0.0)[:, None]
    return weights * (grad - tl.sum(weights * grad, 1)[:, None])


@triton.jit(do_not_specialize=["splits"])
def backward_kernel(
    clean,
    raw_scale,
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
    num_experts,
    splits,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
    NOISE_FLOOR: tl.constexpr,
    MULTIPLE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Run the backward pass.

    The columns of the largest noisy logits have further gradients, through the softmax and the
    thresholds. They are overwritten after all others.
    """
    num_experts = whole(num_experts, MULTIPLE)
    program = tl.program_id(0).to(tl.int64)
    group = program // splits
    start, end = tl.load(row_offsets + group), tl.load(row_offsets + group + 1)
    group_start = group * num_experts
    slots = tl.arange(0, SLOTS)[None, :]
    for first in range(start + program % splits * BLOCK_ROWS, end, splits * BLOCK_ROWS):
        rows = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < end
        kept = row_mask[:, None] & (slots < COUNT)
        indices = read_slots(ids, rows, row_mask, slots, COUNT)
        values = read_slots(top, rows, row_mask, slots, COUNT)
        kth, next_one = values, values
        if grad_load is not None:
            kth, next_one = thresholds(values, slots, TOP_K)
        slope_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for chunk in range(CHUNKS):
            columns = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            offsets = rows[:, None] * num_experts + columns[None, :]
            in_row = columns < num_experts
            mask = row_mask[:, None] & in_row[None, :]
            slope = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            by_raw = slope
            if grad_load is not None:
                load_weight = tl.load(grad_load + group_start + columns, in_row, other=0.0)
                slope, by_scale, _, by_raw = _load_slope(
                    tl.load(clean + offsets, mask, other=0.0),
                    tl.load(raw_scale + offsets, mask, other=0.0),
                    kth,
                    load_weight[None, :],
                    NOISE_FLOOR,
                )
                by_raw *= by_scale
                slope_sum += slope
            tl.store(grad_clean + offsets, slope, mask)
            if raw_scale is not None:
                tl.store(grad_raw + offsets, by_raw, mask)

        by_noisy = _softmax_gradient(
            gates,
            grad_gates,
            grad_importance,
            row_weight,
            grad_weight,
            group_start + indices,
            rows,
            row_mask,
            slots,
            TOP_K,
        )
        # The writes above must come first.
        tl.debug_barrier()
        offsets = rows[:, None] * num_experts + indices
        if raw_scale is None:
            tl.store(grad_clean + offsets, by_noisy, kept)
        else:
            logits = tl.load(clean + offsets, kept, other=0.0)
            raw = tl.load(raw_scale + offsets, kept, other=0.0)
            if grad_load is None:
                scale, by_raw = noise_scale(raw, NOISE_FLOOR)
                slope, by_scale = by_noisy * 0.0, by_noisy * 0.0
            else:
                load_weight = tl.load(grad_load + (group_start + indices), kept, other=0.0)
                slope, by_scale, scale, by_raw = _load_slope(
                    logits, raw, kth, load_weight, NOISE_FLOOR
                )
                inner, inner_by_scale, _, _ = _load_slope(
                    logits, raw, next_one, load_weight, NOISE_FLOOR
                )
                inside = values > next_one
                outside_sum = tl.sum(slope_sum, 1) - tl.sum(tl.where(inside, slope, 0.0), 1)
                inside_sum = tl.sum(tl.where(inside, inner, 0.0), 1)
                by_noisy -= tl.where(slots == TOP_K - 1, outside_sum[:, None], 0.0)
                by_noisy -= tl.where(slots == TOP_K, inside_sum[:, None], 0.0)
                slope = tl.where(inside, inner, slope)
                by_scale = tl.where(inside, inner_by_scale, by_scale)
            # The noise follows from the noisy logit. It is not needed where that has no gradient,
            # as with a logit of -inf.
            noise = fast_divide(values - logits, scale)
            by_scale += tl.where(by_noisy == 0, 0.0, by_noisy * noise)
            tl.store(grad_clean + offsets, by_noisy + slope, kept)
            tl.store(grad_raw + offsets, by_scale * by_raw, kept)
