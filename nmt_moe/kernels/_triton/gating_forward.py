"""The forward pass of noisy top-k gating: one kernel, or two if rows are wider than a block."""

import triton
import triton.language as tl

from nmt_moe.kernels._triton.gating_parts import (
    LOG2_E,
    TAKEN,
    draw_noise,
    fast_divide,
    fast_exp2,
    key_scores,
    largest,
    noise_scale,
    normal_cdf,
    read_column,
    read_noise,
    read_seed,
    read_slots,
    softmax,
    sort_keys,
    store_choice,
    thresholds,
)
from nmt_moe.kernels._triton.hints import whole


@triton.jit(do_not_specialize=["splits"])
def forward_kernel(
    clean,
    raw_scale,
    noise,
    row_weight,
    row_offsets,
    gates,
    top,
    ids,
    importance,
    load,
    counts,
    seed,
    num_experts,
    splits,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
    NOISE_FLOOR: tl.constexpr,
    MULTIPLE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Run the whole forward pass for rows that fit into a block of columns.

    Each group has `splits` programs, which take turns processing its blocks of rows. Each program
    writes its own row of sums.
    """
    number = read_seed(seed)
    num_experts = whole(num_experts, MULTIPLE)
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(row_offsets + program // splits)
    end = tl.load(row_offsets + program // splits + 1)
    columns, slots = tl.arange(0, BLOCK_COLUMNS), tl.arange(0, SLOTS)[None, :]
    in_row = columns < num_experts
    sum_gates = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    sum_probs = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    sum_chosen = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    for first in range(start + program % splits * BLOCK_ROWS, end, splits * BLOCK_ROWS):
        rows = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < end
        offsets = rows[:, None] * num_experts + columns[None, :]
        mask = row_mask[:, None] & in_row[None, :]
        logits = tl.load(clean + offsets, mask, other=0.0)
        noisy = logits
        if raw_scale is not None:
            scale, _ = noise_scale(tl.load(raw_scale + offsets, mask, other=0.0), NOISE_FLOOR)
            drawn = read_noise(noise, number, rows, 0, offsets, mask, BLOCK_ROWS, BLOCK_COLUMNS)
            noisy = logits + drawn * scale
        keys = tl.where(in_row[None, :], sort_keys(noisy), TAKEN)
        found, indices, keys = largest(keys, columns[None, :], BLOCK_ROWS, COUNT, SLOTS)
        values = key_scores(found)
        weights, high, total = softmax(values, slots, TOP_K)
        store_choice(gates, top, ids, weights, values, indices, rows, row_mask, slots, TOP_K, COUNT)

        chosen = mask & (keys == TAKEN)
        if COUNT > TOP_K:
            last = tl.sum(tl.where(slots == TOP_K, indices, 0), 1)[:, None]
            chosen &= columns[None, :] != last
        sum_chosen += chosen.to(tl.int32)
        weight = fast_divide(1.0, total)
        if row_weight is not None:
            weight *= tl.load(row_weight + rows, row_mask, other=0.0)[:, None]
        # A row with a total of NaN adds NaN to every expert, regardless of the search result.
        rest = tl.where(total != total, float("nan"), 0.0)
        sum_gates += tl.where(chosen, fast_exp2((noisy - high) * LOG2_E) * weight, rest)
        if COUNT > TOP_K:
            kth, next_one = thresholds(values, slots, TOP_K)
            limit = tl.where(chosen & (noisy > next_one), next_one, kth)
            sum_probs += tl.where(mask, normal_cdf(fast_divide(logits - limit, scale)), 0.0)
    sums = program * num_experts + columns
    tl.store(importance + sums, tl.sum(sum_gates, 0), in_row)
    tl.store(counts + sums, tl.sum(sum_chosen, 0), in_row)
    if COUNT > TOP_K:
        tl.store(load + sums, tl.sum(sum_probs, 0), in_row)


@triton.jit
def _merge(
    keys,
    ids,
    more_keys,
    more_ids,
    BLOCK_ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Keep the COUNT largest keys of two (B, SLOTS) lists, with their columns."""
    both = tl.reshape(tl.join(keys, more_keys), (BLOCK_ROWS, 2 * SLOTS))
    columns = tl.reshape(tl.join(ids, more_ids), (BLOCK_ROWS, 2 * SLOTS))
    keys, ids, _ = largest(both, columns, BLOCK_ROWS, COUNT, SLOTS)
    return keys, ids


@triton.jit(do_not_specialize=["num_rows"])
def select_kernel(
    clean,
    raw_scale,
    noise,
    gates,
    top,
    ids,
    seed,
    num_rows,
    num_experts,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
    NOISE_FLOOR: tl.constexpr,
    MULTIPLE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Find the largest noisy logits of rows that are read in chunks, and compute their softmax."""
    number = read_seed(seed)
    num_experts = whole(num_experts, MULTIPLE)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask, slots = rows < num_rows, tl.arange(0, SLOTS)[None, :]
    keys = tl.full((BLOCK_ROWS, SLOTS), TAKEN, tl.int32)
    indices = tl.zeros((BLOCK_ROWS, SLOTS), tl.int32)
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        offsets = rows[:, None] * num_experts + columns[None, :]
        mask = row_mask[:, None] & (columns < num_experts)[None, :]
        noisy = tl.load(clean + offsets, mask, other=0.0)
        if raw_scale is not None:
            scale, _ = noise_scale(tl.load(raw_scale + offsets, mask, other=0.0), NOISE_FLOOR)
            drawn = read_noise(
                noise, number, rows, chunk * BLOCK_COLUMNS, offsets, mask, BLOCK_ROWS, BLOCK_COLUMNS
            )
            noisy += drawn * scale
        more = tl.where((columns < num_experts)[None, :], sort_keys(noisy), TAKEN)
        more, more_ids, _ = largest(more, columns[None, :], BLOCK_ROWS, COUNT, SLOTS)
        keys, indices = _merge(keys, indices, more, more_ids, BLOCK_ROWS, COUNT, SLOTS)
    values = key_scores(keys)
    weights, _, _ = softmax(values, slots, TOP_K)
    store_choice(gates, top, ids, weights, values, indices, rows, row_mask, slots, TOP_K, COUNT)


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(
    clean,
    raw_scale,
    row_weight,
    row_offsets,
    gates,
    top,
    ids,
    importance,
    load,
    counts,
    num_experts,
    splits,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
    NOISE_FLOOR: tl.constexpr,
    MULTIPLE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute the sums for a chunk of columns over rows with chosen experts."""
    num_experts = whole(num_experts, MULTIPLE)
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(row_offsets + program // splits)
    end = tl.load(row_offsets + program // splits + 1)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_row, slots = columns < num_experts, tl.arange(0, SLOTS)[None, :]
    sum_gates = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    sum_probs = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    sum_chosen = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    for first in range(start + program % splits * BLOCK_ROWS, end, splits * BLOCK_ROWS):
        rows = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < end
        weight = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
        if row_weight is not None:
            weight = tl.load(row_weight + rows, row_mask, other=0.0)
        kth = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        next_one = kth
        if COUNT > TOP_K:
            kth, next_one = thresholds(read_slots(top, rows, row_mask, slots, COUNT), slots, TOP_K)
        # An expert's threshold is the (k+1)-th largest logit if the expert's own exceeds that one.
        limit = tl.broadcast_to(kth, (BLOCK_ROWS, BLOCK_COLUMNS))
        for slot in tl.static_range(TOP_K):
            index = read_column(ids, rows, row_mask, COUNT, slot)
            here = row_mask[:, None] & (columns[None, :] == index[:, None])
            weighted = read_column(gates, rows, row_mask, TOP_K, slot) * weight
            sum_chosen += here.to(tl.int32)
            sum_gates += tl.where(here, weighted[:, None], 0.0)
            if COUNT > TOP_K:
                above = read_column(top, rows, row_mask, COUNT, slot)[:, None] > next_one
                limit = tl.where(here & above, next_one, limit)
        if COUNT > TOP_K:
            offsets = rows[:, None] * num_experts + columns[None, :]
            mask = row_mask[:, None] & in_row[None, :]
            logits = tl.load(clean + offsets, mask, other=0.0)
            scale, _ = noise_scale(tl.load(raw_scale + offsets, mask, other=0.0), NOISE_FLOOR)
            sum_probs += tl.where(mask, normal_cdf(fast_divide(logits - limit, scale)), 0.0)
    sums = program * num_experts + columns
    tl.store(importance + sums, tl.sum(sum_gates, 0), in_row)
    tl.store(counts + sums, tl.sum(sum_chosen, 0), in_row)
    if COUNT > TOP_K:
        tl.store(load + sums, tl.sum(sum_probs, 0), in_row)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def noise_kernel(
    noise,
    seed,
    first_row,
    num_rows,
    num_experts,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store the noise that the other kernels only draw for the given rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    drawn = draw_noise(tl.load(seed), first_row + rows, first_column, BLOCK_ROWS, BLOCK_COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < num_experts)[None, :]
    tl.store(noise + (rows[:, None] * num_experts + columns[None, :]), drawn, mask)
