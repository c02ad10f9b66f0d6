"""Factored Adam for expert matrices, in two passes over the gradient and one over the weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of rows and columns in a program's tile, and number of warps. Each thread holds 16 values,
# so that a multiprocessor has enough registers for four programs.
TILE_ROWS, TILE_COLUMNS, WARPS = 16, 256, 8

TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32


@triton.jit
def _square_sums_kernel(
    grad,  # (E, D, H)
    row_mean,  # (E, D) float32
    column_sums,  # (E, row_blocks, H) float32
    grad_stride,  # elements from one expert to the next
    model_dim,
    hidden_dim,
    row_blocks,
    beta2,
    gain,  # (1 - beta2) / H
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Update the row means of one block of rows, and store the sums of squares in each column."""
    program = tl.program_id(0).to(tl.int64)
    expert, block = program // row_blocks, program % row_blocks
    rows = block * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, hidden_dim, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        inside = (rows < model_dim)[:, None] & (columns < hidden_dim)[None, :]
        offsets = expert * grad_stride + rows[:, None] * hidden_dim + columns[None, :]
        values = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        squares = values * values
        total += tl.sum(squares, 1)
        out = column_sums + program * hidden_dim + columns
        tl.store(out, tl.sum(squares, 0), mask=columns < hidden_dim)
    means = row_mean + expert * model_dim + rows
    old = tl.load(means, mask=rows < model_dim, other=0.0)
    tl.store(means, beta2 * old + gain * total, mask=rows < model_dim)


@triton.jit
def _column_means_kernel(
    column_sums,  # (E, row_blocks, H) float32
    column_mean,  # (E, H) float32
    hidden_dim,
    row_blocks,
    column_blocks,
    beta2,
    gain,  # (1 - beta2) / D
    BLOCK_H: tl.constexpr,
):
    """Update the column means by adding up the blocks of rows in a fixed order."""
    program = tl.program_id(0).to(tl.int64)
    expert, block = program // column_blocks, program % column_blocks
    columns = block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < hidden_dim
    total = tl.zeros((BLOCK_H,), tl.float32)
    for part in range(0, row_blocks):
        sums = column_sums + (expert * row_blocks + part) * hidden_dim + columns
        total += tl.load(sums, mask=inside, other=0.0)
    means = column_mean + expert * hidden_dim + columns
    old = tl.load(means, mask=inside, other=0.0)
    tl.store(means, beta2 * old + gain * total, mask=inside)


@triton.jit
def _update_kernel(
    weight,  # (E, D, H)
    grad,  # (E, D, H)
    row_mean,  # (E, D) float32
    column_mean,  # (E, H) float32
    weight_stride,  # elements from one expert to the next
    grad_stride,
    model_dim,
    hidden_dim,
    row_blocks,
    step_size,
    eps,
    keep,  # fraction of the weights that weight decay leaves
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_MEAN: tl.constexpr,
):
    """Update the weights in one block of rows.

    Each program computes the average of all row means of its expert.
    """
    program = tl.program_id(0).to(tl.int64)
    expert, block = program // row_blocks, program % row_blocks
    means = row_mean + expert * model_dim
    total = tl.zeros((BLOCK_MEAN,), tl.float32)
    for start in range(0, model_dim, BLOCK_MEAN):
        offsets = start + tl.arange(0, BLOCK_MEAN)
        total += tl.load(means + offsets, mask=offsets < model_dim, other=0.0)
    mean = tl.sum(total, 0) / model_dim
    rows = block * BLOCK_D + tl.arange(0, BLOCK_D)
    row_root = tl.load(means + rows, mask=rows < model_dim, other=0.0) / tl.maximum(mean, TINY)
    row_root = tl.sqrt(row_root)
    for start in range(0, hidden_dim, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        there = columns < hidden_dim
        inside = (rows < model_dim)[:, None] & there[None, :]
        column = tl.load(column_mean + expert * hidden_dim + columns, mask=there, other=0.0)
        root = row_root[:, None] * tl.sqrt(column)[None, :] + eps
        offsets = rows[:, None] * hidden_dim + columns[None, :]
        values = tl.load(grad + expert * grad_stride + offsets, mask=inside, other=0.0)
        target = weight + expert * weight_stride + offsets
        old = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        new = old * keep - step_size * (values.to(tl.float32) / root)
        tl.store(target, new.to(weight.dtype.element_ty), mask=inside)


def factored_adam(
    weight: Tensor,
    grad: Tensor,
    row_mean: Tensor,
    column_mean: Tensor,
    step_size: float,
    beta2: float,
    eps: float,
    keep: float,
) -> None:
    """Run the three kernels; see `kernels.factored_adam`.

    Args:
        weight: (E, D, H) float32, bfloat16 or float16, the experts' matrices; each matrix is
            contiguous. Updated in place, like the means.
        grad: (E, D, H), the gradients; each matrix is contiguous.
        row_mean: (E, D) float32, contiguous, running means of the squared gradient over each row.
        column_mean: (E, H) float32, contiguous, running means over each column.
        step_size: Learning rate with the bias correction.
        beta2: Decay rate of the running means.
        eps: Constant added to the square root of the second moment.
        keep: Factor of the old weights; 1 without weight decay.
    """
    num_experts, model_dim, hidden_dim = weight.shape
    block_h = min(TILE_COLUMNS, triton.next_power_of_2(hidden_dim))
    block_d = min(TILE_ROWS, triton.next_power_of_2(model_dim))
    row_blocks = triton.cdiv(model_dim, block_d)
    column_blocks = triton.cdiv(hidden_dim, block_h)
    column_sums = torch.empty(
        (num_experts, row_blocks, hidden_dim), dtype=torch.float32, device=weight.device
    )
    tile = {"BLOCK_D": block_d, "BLOCK_H": block_h, "num_warps": WARPS}
    with torch.cuda.device_of(weight):
        _square_sums_kernel[(num_experts * row_blocks,)](
            grad,
            row_mean,
            column_sums,
            grad.stride(0),
            model_dim,
            hidden_dim,
            row_blocks,
            beta2,
            (1 - beta2) / hidden_dim,
            **tile,
        )
        _column_means_kernel[(num_experts * column_blocks,)](
            column_sums,
            column_mean,
            hidden_dim,
            row_blocks,
            column_blocks,
            beta2,
            (1 - beta2) / model_dim,
            BLOCK_H=block_h,
        )
        _update_kernel[(num_experts * row_blocks,)](
            weight,
            grad,
            row_mean,
            column_mean,
            weight.stride(0),
            grad.stride(0),
            model_dim,
            hidden_dim,
            row_blocks,
            step_size,
            eps,
            keep,
            BLOCK_MEAN=min(1024, triton.next_power_of_2(model_dim)),
            **tile,
        )
