"""The forward pass of noisy top-k gating: one kernel, or two if rows are wider than a block."""

import triton
import triton.language as tl

from nmt_moe.kernels._triton.gating_parts import (
    TAKEN,
    draw_noise,
    find_inside,
    has_nan,
    key_scores,
    largest,
    margins,
    normal_cdf,
    read_column,
    read_noise,
    read_seed,
    softplus,
    sort_keys,
    threshold,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
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
    sum_gates = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    sum_probs = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    sum_chosen = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for first in range(start + program % splits * BLOCK_ROWS, end, splits * BLOCK_ROWS):
        rows = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < end
        offsets = rows[:, None] * num_experts + columns[None, :]
        mask = row_mask[:, None] & (columns < num_experts)[None, :]
        logits = tl.load(clean + offsets, mask, other=0.0)
        noisy = logits
        if raw_scale is not None:
            scale = softplus(tl.load(raw_scale + offsets, mask, other=0.0)) + NOISE_FLOOR
            drawn = read_noise(noise, number, rows, 0, offsets, mask, BLOCK_ROWS, BLOCK_COLUMNS)
            noisy = logits + drawn * scale
        keys = tl.where((columns < num_experts)[None, :], sort_keys(noisy), TAKEN)
        keys, indices, ranks = largest(
            keys, columns[None, :], BLOCK_ROWS, BLOCK_COLUMNS, COUNT, SLOTS
        )
        values = key_scores(keys)
        high = tl.max(values, 1)[:, None]
        powers = tl.where(slots < TOP_K, tl.exp(values - high), 0.0)
        total = tl.where(has_nan(noisy)[:, None], float("nan"), tl.sum(powers, 1)[:, None])

        kept, slot_offsets = row_mask[:, None] & (slots < COUNT), rows[:, None] * COUNT + slots
        tl.store(top + slot_offsets, values, kept)
        tl.store(ids + slot_offsets, indices.to(tl.int64), kept)
        kept, slot_offsets = row_mask[:, None] & (slots < TOP_K), rows[:, None] * TOP_K + slots
        tl.store(gates + slot_offsets, powers / total, kept)

        chosen = mask & (ranks > 0) & (ranks <= TOP_K)
        sum_chosen += tl.sum(chosen.to(tl.int32), 0)
        dense = tl.exp(noisy - high) / total
        if row_weight is not None:
            dense *= tl.load(row_weight + rows, row_mask, other=0.0)[:, None]
        # A row that contains NaN adds NaN to every expert, regardless of the search result.
        sum_gates += tl.sum(tl.where(chosen | (total != total), dense, 0.0), 0)
        if COUNT > TOP_K:
            kth = tl.max(tl.where(slots == TOP_K - 1, values, float("-inf")), 1)[:, None]
            next_one = tl.max(tl.where(slots == TOP_K, values, float("-inf")), 1)[:, None]
            limit = threshold(chosen & (noisy > next_one), kth, next_one)
            probs = normal_cdf((logits - limit) / scale)
            sum_probs += tl.sum(tl.where(mask, probs, 0.0), 0)
    sums, in_row = program * num_experts + columns, columns < num_experts
    tl.store(importance + sums, sum_gates, in_row)
    tl.store(counts + sums, sum_chosen, in_row)
    if COUNT > TOP_K:
        tl.store(load + sums, sum_probs, in_row)


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
    keys, ids, _ = largest(both, columns, BLOCK_ROWS, 2 * SLOTS, COUNT, SLOTS)
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Find the largest noisy logits of rows that are read in chunks, and compute their softmax."""
    number = read_seed(seed)
    num_experts = whole(num_experts, MULTIPLE)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask, slots = rows < num_rows, tl.arange(0, SLOTS)[None, :]
    keys = tl.full((BLOCK_ROWS, SLOTS), TAKEN, tl.int32)
    indices = tl.zeros((BLOCK_ROWS, SLOTS), tl.int32)
    is_nan = rows < 0
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        offsets = rows[:, None] * num_experts + columns[None, :]
        mask = row_mask[:, None] & (columns < num_experts)[None, :]
        noisy = tl.load(clean + offsets, mask, other=0.0)
        if raw_scale is not None:
            scale = softplus(tl.load(raw_scale + offsets, mask, other=0.0)) + NOISE_FLOOR
            drawn = read_noise(
                noise, number, rows, chunk * BLOCK_COLUMNS, offsets, mask, BLOCK_ROWS, BLOCK_COLUMNS
            )
            noisy += drawn * scale
        is_nan |= has_nan(noisy)
        more = tl.where((columns < num_experts)[None, :], sort_keys(noisy), TAKEN)
        more, more_ids, _ = largest(more, columns[None, :], BLOCK_ROWS, BLOCK_COLUMNS, COUNT, SLOTS)
        keys, indices = _merge(keys, indices, more, more_ids, BLOCK_ROWS, COUNT, SLOTS)
    values = key_scores(keys)
    powers = tl.where(slots < TOP_K, tl.exp(values - tl.max(values, 1)[:, None]), 0.0)
    total = tl.where(is_nan, float("nan"), tl.sum(powers, 1))[:, None]
    kept, slot_offsets = row_mask[:, None] & (slots < COUNT), rows[:, None] * COUNT + slots
    tl.store(top + slot_offsets, values, kept)
    tl.store(ids + slot_offsets, indices.to(tl.int64), kept)
    kept, slot_offsets = row_mask[:, None] & (slots < TOP_K), rows[:, None] * TOP_K + slots
    tl.store(gates + slot_offsets, powers / total, kept)


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute the sums for a chunk of columns over rows with chosen experts."""
    num_experts = whole(num_experts, MULTIPLE)
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(row_offsets + program // splits)
    end = tl.load(row_offsets + program // splits + 1)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    sum_gates = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    sum_probs = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    sum_chosen = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for first in range(start + program % splits * BLOCK_ROWS, end, splits * BLOCK_ROWS):
        rows = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < end
        weight = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
        if row_weight is not None:
            weight = tl.load(row_weight + rows, row_mask, other=0.0)
        for slot in tl.static_range(TOP_K):
            index = read_column(ids, rows, row_mask, COUNT, slot)
            here = row_mask[:, None] & (columns[None, :] == index[:, None])
            weighted = read_column(gates, rows, row_mask, TOP_K, slot) * weight
            sum_chosen += tl.sum(here.to(tl.int32), 0)
            sum_gates += tl.sum(tl.where(here, weighted[:, None], 0.0), 0)
        if COUNT > TOP_K:
            offsets = rows[:, None] * num_experts + columns[None, :]
            mask = row_mask[:, None] & (columns < num_experts)[None, :]
            logits = tl.load(clean + offsets, mask, other=0.0)
            scale = softplus(tl.load(raw_scale + offsets, mask, other=0.0)) + NOISE_FLOOR
            inside = find_inside(top, ids, rows, row_mask, columns, TOP_K)
            z = margins(logits, scale, inside, top, rows, row_mask, TOP_K)
            sum_probs += tl.sum(tl.where(mask, normal_cdf(z), 0.0), 0)
    sums, in_row = program * num_experts + columns, columns < num_experts
    tl.store(importance + sums, sum_gates, in_row)
    tl.store(counts + sums, sum_chosen, in_row)
    if COUNT > TOP_K:
        tl.store(load + sums, sum_probs, in_row)


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
