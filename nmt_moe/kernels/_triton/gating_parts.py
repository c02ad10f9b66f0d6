"""Functions for blocks of B rows and W columns (one per expert) that all gating kernels share."""

import triton
import triton.language as tl

INV_SQRT_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# The lowest finite float32 number.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# A key below the key of every score, including -inf, so that no score is chosen twice.
TAKEN = tl.constexpr(-(2**31))


@triton.jit
def read_seed(seed):
    """Read the seed of the noise; 0 if no noise is drawn."""
    number = 0
    if seed is not None:
        number = tl.load(seed)
    return number


@triton.jit
def draw_noise(seed, rows, first_column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Draw (B, W) standard normal numbers that depend only on seed, row and column.

    Philox gives four numbers for each counter, which consists of the row (64 bits) and a quarter of
    the column (32 bits).
    """
    num_quads: tl.constexpr = BLOCK_COLUMNS // 4
    quads = (first_column // 4 + tl.arange(0, num_quads)).to(tl.uint32)
    quads = tl.broadcast_to(quads[None, :], (BLOCK_ROWS, num_quads))
    rows = tl.broadcast_to(rows[:, None], (BLOCK_ROWS, num_quads))
    low, high = (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32)
    bits_0, bits_1, bits_2, bits_3 = tl.philox(seed, low, high, quads, quads * 0)
    noise_0, noise_1 = tl.pair_uniform_to_normal(
        tl.uint_to_uniform_float(bits_0), tl.uint_to_uniform_float(bits_1)
    )
    noise_2, noise_3 = tl.pair_uniform_to_normal(
        tl.uint_to_uniform_float(bits_2), tl.uint_to_uniform_float(bits_3)
    )
    # Four neighbouring columns share a counter, so no values have to move between threads.
    fours = tl.join(tl.join(noise_0, noise_2), tl.join(noise_1, noise_3))
    return tl.reshape(fours, (BLOCK_ROWS, BLOCK_COLUMNS))


@triton.jit
def read_noise(
    noise,
    seed,
    rows,
    first_column,
    offsets,
    mask,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Read the noise if it is given; otherwise, draw it."""
    if noise is None:
        drawn = draw_noise(seed, rows, first_column, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        drawn = tl.load(noise + offsets, mask, other=0.0)
    return drawn


@triton.jit
def softplus(raw):
    """Compute log(1 + exp(raw)) without overflow."""
    return tl.maximum(raw, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(raw)))


@triton.jit
def sort_keys(scores):
    """Map float32 scores to int32 keys above `TAKEN` in the same order.

    NaN counts as infinity and -0 as 0.
    """
    bits = tl.where(scores != scores, float("inf"), scores + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_scores(keys):
    """Map keys back to scores; `TAKEN`, which stands for no score, becomes -inf."""
    scores = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(keys == TAKEN, float("-inf"), scores)


@triton.jit
def largest(
    keys,
    columns,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Find the COUNT largest keys of each row. The lowest column wins ties.

    Args:
        keys: (B, W), keys from `sort_keys`; `TAKEN` beyond the end of the row.
        columns: (1, W) or (B, W) int32, the column number of each key.
        BLOCK_ROWS: Number of rows in the block, B.
        WIDTH: Number of keys in a row, W.
        COUNT: Number of keys to find in each row, at most SLOTS.
        SLOTS: Number of columns of the results, a power of two.

    Returns:
        found: (B, SLOTS) int32, the keys in descending order; `TAKEN` in slots COUNT and higher.
        ids: (B, SLOTS) int32, the columns of these keys; 0 in slots COUNT and higher.
        ranks: (B, W) int32, the rank of each key, from 1 for the largest to COUNT; 0 for all other
            keys.
    """
    slots = tl.arange(0, SLOTS)[None, :]
    found = tl.full((BLOCK_ROWS, SLOTS), TAKEN, tl.int32)
    ids = tl.zeros((BLOCK_ROWS, SLOTS), tl.int32)
    ranks = tl.zeros((BLOCK_ROWS, WIDTH), tl.int32)
    for slot in tl.static_range(COUNT):
        key = tl.max(keys, 1)[:, None]
        column = tl.min(tl.where(keys == key, columns, 0x7FFFFFFF), 1)[:, None]
        found = tl.where(slots == slot, key, found)
        ids = tl.where(slots == slot, column, ids)
        here = columns == column
        ranks = tl.where(here, slot + 1, ranks)
        keys = tl.where(here, TAKEN, keys)
    return found, ids, ranks


@triton.jit
def has_nan(scores):
    """Return whether each row contains NaN, which the search treats as infinity: (B,) bool."""
    return tl.max((scores != scores).to(tl.int32), 1) > 0


@triton.jit
def read_column(table, rows, row_mask, COUNT: tl.constexpr, slot: tl.constexpr):
    """Read column `slot` of an (N, COUNT) table for the B rows of a block."""
    return tl.load(table + rows * COUNT + slot, row_mask, other=0)


@triton.jit
def find_inside(top, ids, rows, row_mask, columns, TOP_K: tl.constexpr):
    """Mark the chosen experts whose noisy logits strictly exceed the (k+1)-th: (B, W) bool."""
    next_one = read_column(top, rows, row_mask, TOP_K + 1, TOP_K)
    inside = (rows[:, None] < 0) & (columns[None, :] < 0)
    for slot in tl.static_range(TOP_K):
        above = read_column(top, rows, row_mask, TOP_K + 1, slot) > next_one
        index = read_column(ids, rows, row_mask, TOP_K + 1, slot)
        inside |= above[:, None] & (columns[None, :] == index[:, None])
    return inside


@triton.jit
def margins(clean, scale, inside, top, rows, row_mask, TOP_K: tl.constexpr):
    """Compute (clean - threshold) / scale.

    The threshold is the (k+1)-th largest noisy logit where `inside` is True, and the k-th largest
    elsewhere.
    """
    kth = read_column(top, rows, row_mask, TOP_K + 1, TOP_K - 1)[:, None]
    next_one = read_column(top, rows, row_mask, TOP_K + 1, TOP_K)[:, None]
    return (clean - threshold(inside, kth, next_one)) / scale


@triton.jit
def threshold(inside, kth, next_one):
    """Choose each expert's threshold: (B, W) bool and (B, 1) logits -> (B, W).

    A logit of -inf does not exceed a threshold of -inf, and inf - inf would give NaN.
    """
    return tl.where(inside, tl.maximum(next_one, LOWEST), tl.maximum(kth, LOWEST))


@triton.jit
def normal_cdf(z):
    """Compute Phi(z)."""
    return 0.5 + 0.5 * tl.erf(z * INV_SQRT_2)


@triton.jit
def normal_density(z):
    """Compute Phi'(z)."""
    return INV_SQRT_2PI * tl.exp(-0.5 * z * z)


@triton.jit
def gate_gradient(
    grad_gates,
    grad_importance,
    group_start,
    weight,
    ids,
    rows,
    row_mask,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
    slot: tl.constexpr,
):
    """Add up the gradient of the gate in slot `slot` and its gradient through the importance.

    Args:
        grad_gates: (N, K), gradient of the gates, or None.
        grad_importance: (G, E), gradient of the importance, or None.
        group_start: Index at which the row's group begins in `grad_importance`.
        weight: (B,), the weight of each row in the importance.
        ids: (N, COUNT), columns of the largest logits.
        rows: (B,), row numbers.
        row_mask: (B,) bool, True for a row that exists.
        TOP_K: Number of experts per row, K.
        COUNT: Number of columns of `ids`.
        slot: Slot of the gate, from 0 to K - 1.

    Returns:
        (B,), the total gradients, and (B,), the gradients of the importance, without the weights.
    """
    direct = weight * 0.0
    if grad_gates is not None:
        direct = read_column(grad_gates, rows, row_mask, TOP_K, slot)
    through = weight * 0.0
    if grad_importance is not None:
        index = read_column(ids, rows, row_mask, COUNT, slot)
        through = tl.load(grad_importance + group_start + index, row_mask, other=0.0)
    return direct + weight * through, through


@triton.jit
def gate_dot(
    gates,
    grad_gates,
    grad_importance,
    group_start,
    weight,
    ids,
    rows,
    row_mask,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Sum gate times gradient over a row, and gate times the importance's gradient: (B,) each."""
    dot, through_dot = weight * 0.0, weight * 0.0
    for slot in tl.static_range(TOP_K):
        gate = read_column(gates, rows, row_mask, TOP_K, slot)
        grad, through = gate_gradient(
            grad_gates,
            grad_importance,
            group_start,
            weight,
            ids,
            rows,
            row_mask,
            TOP_K,
            COUNT,
            slot,
        )
        dot += gate * grad
        through_dot += gate * through
    return dot, through_dot


@triton.jit
def spread_gradient(
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
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Put the gradients of the largest noisy logits into their columns: (B, W), 0 elsewhere.

    These gradients pass through the softmax and through the two thresholds of the load.
    """
    dense = columns[None, :] * weight[:, None] * 0.0
    for slot in tl.static_range(COUNT):
        slope = weight * 0.0
        if slot < TOP_K:
            grad, _ = gate_gradient(
                grad_gates,
                grad_importance,
                group_start,
                weight,
                ids,
                rows,
                row_mask,
                TOP_K,
                COUNT,
                slot,
            )
            slope = read_column(gates, rows, row_mask, TOP_K, slot) * (grad - dot)
        if COUNT > TOP_K:
            if slot == TOP_K - 1:
                slope -= outside_sum
            if slot == TOP_K:
                slope -= inside_sum
        here = columns[None, :] == read_column(ids, rows, row_mask, COUNT, slot)[:, None]
        dense = tl.where(here, slope[:, None], dense)
    return dense
