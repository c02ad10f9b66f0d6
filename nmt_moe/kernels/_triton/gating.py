"""Launchers for noisy top-k gating."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nmt_moe.kernels._triton.gating_backward import backward_kernel
from nmt_moe.kernels._triton.gating_forward import (
    forward_kernel,
    noise_kernel,
    select_kernel,
    sum_kernel,
)

# Maximum number of columns in a block. Wider rows are read in chunks of this size.
MAX_BLOCK_COLUMNS = 1024
# Number of values in a block. With 8 values per thread in four warps, there are enough registers to
# run several blocks at a time.
BLOCK_NUMBERS = 1024
# Maximum number of programs. On the largest GPU, each multiprocessor gets a few programs. Each
# program writes one row of partial sums, and this many rows still need little memory.
MAX_PROGRAMS = 1024


class Choice(NamedTuple):
    """Results of the forward pass. C is K + 1 if the load is a smooth estimate, otherwise K.

    Attributes:
        gates: (N, K), the weights of the chosen experts.
        top: (N, C), the largest noisy logits, in descending order.
        ids: (N, C) int64, the columns of these logits.
        importance: (G, E), the sum of each expert's gates.
        load: (G, E), the smooth estimate of each expert's number of tokens; uninitialised if it is
            not computed.
        counts: (G, E) int64, the number of tokens of each expert.
    """

    gates: Tensor
    top: Tensor
    ids: Tensor
    importance: Tensor
    load: Tensor
    counts: Tensor


class Grid(NamedTuple):
    """The distribution of rows among programs.

    Attributes:
        splits: Number of programs per group. They take turns at processing the group's blocks of
            rows.
        block_rows: Number of rows in a block.
        block_columns: Number of columns in a block.
        chunks: Number of blocks of columns in a row.
        slots: Number of logits kept for each row, rounded up to a power of two.
        multiple: Divisor of the row's width, a hint for the compiler.
    """

    splits: int
    block_rows: int
    block_columns: int
    chunks: int
    slots: int
    multiple: int


def choose_grid(num_rows: int, num_groups: int, num_experts: int, count: int) -> Grid:
    """Choose block sizes, depending on the width of rows, and the number of programs.

    Args:
        num_rows: Number of rows, N.
        num_groups: Number of groups, G.
        num_experts: Number of experts, E.
        count: Number of logits kept for each row, C.
    """
    block_columns = min(max(triton.next_power_of_2(num_experts), 16), MAX_BLOCK_COLUMNS)
    block_rows = max(BLOCK_NUMBERS // block_columns, 1)
    chunks = triton.cdiv(num_experts, block_columns)
    splits = min(triton.cdiv(num_rows, block_rows), triton.cdiv(MAX_PROGRAMS, num_groups))
    slots = triton.next_power_of_2(count)
    # Triton itself recognises only multiples of 16. A multiple of 4 lets a load read 4 values.
    multiple = math.gcd(16, num_experts)
    multiple = multiple if multiple >= 4 else 1
    return Grid(max(splits, 1), block_rows, block_columns, chunks, slots, multiple)


def gating_forward(
    clean: Tensor,
    raw_scale: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    row_weight: Tensor | None,
    row_offsets: Tensor,
    top_k: int,
    noise_floor: float,
) -> Choice:
    """Choose experts as `kernels.noisy_top_k` does, in float32.

    Args:
        clean: (N, E), logits without noise.
        raw_scale: (N, E), logits of the noise's standard deviation; None for no noise.
        noise: (N, E), standard normal numbers; None to draw them from `seed`.
        seed: (1,) int64, the seed of the noise; None if no noise is drawn.
        row_weight: (N,), the weight of each row in the importance; None for ones.
        row_offsets: (G + 1,) int64, bounds of the rows of each group, from 0 to N.
        top_k: Number of experts per token, K.
        noise_floor: Constant added to the noise's standard deviation.
    """
    clean = clean.contiguous()
    num_rows, num_experts = clean.shape
    num_groups = len(row_offsets) - 1
    smooth = raw_scale is not None and top_k < num_experts
    count = top_k + smooth
    grid = choose_grid(num_rows, num_groups, num_experts, count)
    gates, top = clean.new_empty(num_rows, top_k), clean.new_empty(num_rows, count)
    ids = row_offsets.new_empty(num_rows, count)
    shape = num_groups, grid.splits, num_experts
    importance, load = clean.new_empty(shape), clean.new_empty(shape if smooth else (1, 1, 1))
    counts = torch.empty(shape, dtype=torch.int32, device=clean.device)
    inputs = clean, _contiguous(raw_scale), _contiguous(noise)
    weight = _contiguous(row_weight)
    choice, sums = (gates, top, ids), (importance, load, counts)
    limits = top_k, count, noise_floor, grid.multiple, grid.block_rows, grid.block_columns
    with torch.cuda.device_of(clean):
        if grid.chunks == 1:
            forward_kernel[(num_groups * grid.splits,)](
                *inputs,
                weight,
                row_offsets,
                *choice,
                *sums,
                seed,
                num_experts,
                grid.splits,
                *limits,
                grid.slots,
            )
        else:
            select_kernel[(triton.cdiv(num_rows, grid.block_rows),)](
                *inputs, *choice, seed, num_rows, num_experts, *limits, grid.chunks, grid.slots
            )
            sum_kernel[(num_groups * grid.splits, grid.chunks)](
                *inputs[:2], weight, row_offsets, *choice, *sums, num_experts, grid.splits, *limits
            )
    # Each program has written its own row of sums. Add up these rows in a fixed order.
    return Choice(*choice, *(partial.sum(1) for partial in sums))


def gating_backward(
    clean: Tensor,
    raw_scale: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    row_weight: Tensor | None,
    row_offsets: Tensor,
    choice: list[Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    noise_floor: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the backward pass of `gating_forward`.

    Args:
        clean: (N, E), logits without noise.
        raw_scale: (N, E), logits of the noise's standard deviation; None for no noise.
        noise: (N, E), the noise of the forward pass; None to draw it from `seed` again.
        seed: Seed of the forward pass.
        row_weight: (N,), the weight of each row in the importance; None for ones.
        row_offsets: (G + 1,) int64, bounds of the rows of each group.
        choice: The forward pass's gates (N, K), top (N, C) and ids (N, C).
        grads: Gradients of the gates (N, K), the importance (G, E) and the smooth load (G, E); None
            for a gradient of 0.
        noise_floor: Constant that the forward pass added to the noise's standard deviation.

    Returns:
        Gradients of `clean`, `raw_scale` and `row_weight`; None for an input that is None.
    """
    clean = clean.contiguous()
    num_rows, num_experts = clean.shape
    num_groups = len(row_offsets) - 1
    gates, _, ids = choice
    grid = choose_grid(num_rows, num_groups, num_experts, ids.shape[1])
    grad_clean = torch.empty_like(clean)
    grad_raw = None if raw_scale is None else torch.empty_like(grad_clean)
    grad_weight = None if row_weight is None else clean.new_empty(num_rows)
    with torch.cuda.device_of(clean):
        backward_kernel[(num_groups * grid.splits,)](
            clean,
            _contiguous(raw_scale),
            _contiguous(noise),
            _contiguous(row_weight),
            row_offsets,
            *choice,
            *(_contiguous(grad) for grad in grads),
            grad_clean,
            grad_raw,
            grad_weight,
            seed,
            num_experts,
            grid.splits,
            gates.shape[1],
            ids.shape[1],
            noise_floor,
            grid.multiple,
            grid.block_rows,
            grid.block_columns,
            grid.chunks,
        )
    return grad_clean, grad_raw, grad_weight


def write_noise(seed: Tensor, first_row: int, noise: Tensor) -> Tensor:
    """Fill `noise`, (N, E), with the noise that the kernels draw, beginning at row `first_row`."""
    num_rows, num_experts = noise.shape
    grid = choose_grid(num_rows, 1, num_experts, 1)
    with torch.cuda.device_of(noise):
        noise_kernel[(triton.cdiv(num_rows, grid.block_rows), grid.chunks)](
            noise, seed, first_row, num_rows, num_experts, grid.block_rows, grid.block_columns
        )
    return noise


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
