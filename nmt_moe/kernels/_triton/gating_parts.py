"""Functions for blocks of B rows and W columns (one per expert) that all gating kernels share.

Logarithms, sines, cosines and quotients are the GPU's fast approximations. Triton's interpreter
has none, so there these functions compute the plain values. `tests/kernels/test_fast_math.py`
states the errors of all approximations and checks what they do to the results.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from nmt_moe.kernels import _backend

INTERPRETED = tl.constexpr(_backend.INTERPRETED)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
LN_2, LOG2_E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
# The lowest finite float32 number.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# A key below the key of every score, including -inf, so that no score is chosen twice.
TAKEN = tl.constexpr(-(2**31))
# Salmon et al. 2011 found no statistical fault in Philox with 7 rounds.
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def fast_log2(x):
    """Compute the binary logarithm within 2^-22 for x from 0.5 to 2, otherwise within 2 ulp."""
    if INTERPRETED:
        return tl.log2(x)
    return libdevice.fast_log2f(x)


@triton.jit
def fast_exp2(x):
    """Compute 2^x within 2 ulp; 0 for results below 2^-126."""
    if INTERPRETED:
        return tl.exp2(x)
    return libdevice.exp2(x)


@triton.jit
def fast_divide(x, y):
    """Compute x / y within 2 ulp; 0 if |y| is above 2^126."""
    if INTERPRETED:
        return x / y
    return libdevice.fast_dividef(x, y)


@triton.jit
def fast_sin(x):
    """Compute the sine of an angle from -pi to pi within 2^-21.4."""
    if INTERPRETED:
        return tl.sin(x)
    return libdevice.fast_sinf(x)


@triton.jit
def fast_cos(x):
    """Compute the cosine of an angle from -pi to pi within 2^-21.1."""
    if INTERPRETED:
        return tl.cos(x)
    return libdevice.fast_cosf(x)


@triton.jit
def to_normal(bits, more_bits):
    """Map two uint32 numbers to two independent standard normal numbers (Box and Muller 1958)."""
    # Numbers above 0 and up to 1. Rounding the largest ones to 1 gives a radius of 0.
    uniform = bits.to(tl.float32) * 2.0**-32 + 2.0**-33
    angle = more_bits.to(tl.int32, bitcast=True).to(tl.float32) * (3.14159265358979 * 2.0**-31)
    # An approximate logarithm of a number just below 1 could be positive.
    radius = tl.sqrt(tl.maximum(fast_log2(uniform) * (-2.0 * LN_2), 0.0))
    return radius * fast_cos(angle), radius * fast_sin(angle)


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
    bits_0, bits_1, bits_2, bits_3 = tl.philox(seed, low, high, quads, quads * 0, PHILOX_ROUNDS)
    noise_0, noise_1 = to_normal(bits_0, bits_1)
    noise_2, noise_3 = to_normal(bits_2, bits_3)
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
def noise_scale(raw, NOISE_FLOOR: tl.constexpr):
    """Compute softplus(raw) + NOISE_FLOOR and its derivative, sigmoid(raw), without overflow."""
    power = fast_exp2(tl.abs(raw) * -LOG2_E)
    scale = fast_log2(1.0 + power) * LN_2 + (tl.maximum(raw, 0.0) + NOISE_FLOOR)
    return scale, fast_divide(tl.where(raw >= 0, 1.0, power), 1.0 + power)


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
def largest(keys, columns, BLOCK_ROWS: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr):
    """Find the COUNT largest keys of each row. The lowest column wins ties.

    Args:
        keys: (B, W), keys from `sort_keys`; `TAKEN` beyond the end of the row.
        columns: (1, W) or (B, W) int32, the column number of each key.
        BLOCK_ROWS: Number of rows in the block, B.
        COUNT: Number of keys to find in each row, at most SLOTS.
        SLOTS: Number of columns of the results, a power of two.

    Returns:
        found: (B, SLOTS) int32, the keys in descending order; `TAKEN` in slots COUNT and higher.
        ids: (B, SLOTS) int32, the columns of these keys; 0 in slots COUNT and higher.
        keys: (B, W), the same keys, with `TAKEN` instead of those that were found.
    """
    slots = tl.arange(0, SLOTS)[None, :]
    found = tl.full((BLOCK_ROWS, SLOTS), TAKEN, tl.int32)
    ids = tl.zeros((BLOCK_ROWS, SLOTS), tl.int32)
    for slot in tl.static_range(COUNT):
        key = tl.max(keys, 1)[:, None]
        column = tl.min(tl.where(keys == key, columns, 0x7FFFFFFF), 1)[:, None]
        found = tl.where(slots == slot, key, found)
        ids = tl.where(slots == slot, column, ids)
        keys = tl.where(columns == column, TAKEN, keys)
    return found, ids, keys


@triton.jit
def softmax(values, slots, TOP_K: tl.constexpr):
    """Compute the softmax of the TOP_K largest logits.

    A row whose largest logit is infinite or was NaN becomes NaN, because the search treats NaN as
    infinity and inf - inf is NaN.

    Args:
        values: (B, SLOTS), the largest logits, in descending order.
        slots: (1, SLOTS), slot numbers.
        TOP_K: Number of logits in the softmax.

    Returns:
        (B, SLOTS), the gates, with 0 in slots TOP_K and higher; (B, 1), the largest logits; and
        (B, 1), the sums that the gates were divided by.
    """
    high = tl.max(values, 1)[:, None]
    powers = tl.where(slots < TOP_K, fast_exp2((values - high) * LOG2_E), 0.0)
    total = tl.sum(powers, 1)[:, None]
    return fast_divide(powers, total), high, total


@triton.jit
def store_choice(
    gates,
    top,
    ids,
    weights,
    values,
    columns,
    rows,
    row_mask,
    slots,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Store (B, SLOTS) gates, largest logits and their columns."""
    kept, offsets = row_mask[:, None] & (slots < COUNT), rows[:, None] * COUNT + slots
    tl.store(top + offsets, values, kept)
    tl.store(ids + offsets, columns, kept)
    kept, offsets = row_mask[:, None] & (slots < TOP_K), rows[:, None] * TOP_K + slots
    tl.store(gates + offsets, weights, kept)


@triton.jit
def read_slots(table, rows, row_mask, slots, COUNT: tl.constexpr):
    """Read the B rows of a block from an (N, COUNT) table: (B, SLOTS), 0 beyond the table."""
    mask = row_mask[:, None] & (slots < COUNT)
    return tl.load(table + (rows[:, None] * COUNT + slots), mask, other=0)


@triton.jit
def read_column(table, rows, row_mask, COUNT: tl.constexpr, slot: tl.constexpr):
    """Read column `slot` of an (N, COUNT) table for the B rows of a block."""
    return tl.load(table + rows * COUNT + slot, row_mask, other=0)


@triton.jit
def pick(values, slots, slot: tl.constexpr):
    """Return column `slot` of (B, SLOTS) values as (B, 1)."""
    return tl.max(tl.where(slots == slot, values, float("-inf")), 1)[:, None]


@triton.jit
def thresholds(values, slots, TOP_K: tl.constexpr):
    """Return the k-th and the (k+1)-th largest noisy logit, (B, 1) each, but no -inf.

    A logit of -inf does not exceed a threshold of -inf, and inf - inf would give NaN.
    """
    kth, next_one = pick(values, slots, TOP_K - 1), pick(values, slots, TOP_K)
    return tl.maximum(kth, LOWEST), tl.maximum(next_one, LOWEST)


@triton.jit
def normal_density(z):
    """Compute Phi'(z)."""
    return fast_exp2(z * z * (-0.5 * LOG2_E)) * INV_SQRT_2PI


@triton.jit
def normal_cdf(z):
    """Compute Phi(z) within 7.5e-8, plus rounding (Abramowitz and Stegun 1964, 26.2.17)."""
    t = fast_divide(1.0, 1.0 + 0.2316419 * tl.abs(z))
    series = -1.821255978 + t * 1.330274429
    series = 0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * series))
    tail = normal_density(z) * t * series
    return tl.where(z >= 0, 1.0 - tail, tail)
