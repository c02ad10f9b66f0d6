"""Copy tokens to rows, and add up each token's rows, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Number of elements in a block: 32 per thread in four warps.
BLOCK_SIZE = 4096


def gather_rows(x: Tensor, row_token: Tensor) -> Tensor:
    """Return a copy of `x[row_token]`.

    Args:
        x: (N, D), the tokens' vectors.
        row_token: (R,) int64, the token of each row.

    Returns:
        (R, D), the vector of each row's token.
    """
    x, row_token = x.contiguous(), row_token.contiguous()
    num_rows, dim = len(row_token), x.shape[1]
    rows = torch.empty((num_rows, dim), dtype=x.dtype, device=x.device)
    if rows.numel() == 0:
        return rows
    block_rows, block_dim = choose_blocks(dim)
    grid = triton.cdiv(num_rows, block_rows), triton.cdiv(dim, block_dim)
    with torch.cuda.device_of(x):
        _gather_kernel[grid](x, row_token, rows, num_rows, dim, block_rows, block_dim)
    return rows


def sum_rows(rows: Tensor, token_rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up the rows of each token in float32, in the order of its slots.

    Args:
        rows: (R, D), the vectors to add up.
        token_rows: (N, K) int64, the rows of each token; R in an empty slot.
        weights: (N, K), the factor of each row; None for ones.

    Returns:
        (N, D), the sums, in the dtype of `rows`.
    """
    rows, token_rows = rows.contiguous(), token_rows.contiguous()
    num_tokens, num_slots = token_rows.shape
    dim = rows.shape[1]
    total = torch.empty((num_tokens, dim), dtype=rows.dtype, device=rows.device)
    if total.numel() == 0:
        return total
    block_tokens, block_dim = choose_blocks(dim)
    grid = triton.cdiv(num_tokens, block_tokens), triton.cdiv(dim, block_dim)
    with torch.cuda.device_of(rows):
        _sum_kernel[grid](
            rows,
            token_rows,
            rows if weights is None else weights.contiguous(),
            total,
            num_tokens,
            len(rows),
            num_slots,
            dim,
            weights is not None,
            block_tokens,
            block_dim,
        )
    return total


def choose_blocks(dim: int) -> tuple[int, int]:
    """Return the number of vectors in a block, and the number of elements from each of them.

    A block holds whole vectors if they fit, so that neighbouring threads read neighbouring
    addresses.
    """
    block_dim = min(triton.next_power_of_2(dim), BLOCK_SIZE // 4)
    return BLOCK_SIZE // block_dim, block_dim


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    x,
    row_token,
    rows,
    num_rows,
    dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    token = tl.load(row_token + row, mask=row < num_rows, other=0)
    inside = (row < num_rows)[:, None] & (column < dim)[None, :]
    vector = tl.load(x + token[:, None] * dim + column[None, :], mask=inside)
    tl.store(rows + row[:, None] * dim + column[None, :], vector, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _sum_kernel(
    rows,
    token_rows,
    weights,
    total,
    num_tokens,
    num_rows,
    num_slots,
    dim,
    WEIGHTED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    is_token, is_column = token < num_tokens, column < dim
    acc = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), dtype=tl.float32)
    for k in range(num_slots):
        slot = token * num_slots + k
        row = tl.load(token_rows + slot, mask=is_token, other=num_rows)
        inside = (row < num_rows)[:, None] & is_column[None, :]
        vector = tl.load(rows + row[:, None] * dim + column[None, :], mask=inside, other=0)
        vector = vector.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + slot, mask=is_token, other=0).to(tl.float32)
            vector = vector * weight[:, None]
        acc += vector
    out = total + token[:, None] * dim + column[None, :]
    tl.store(out, acc.to(total.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])
