"""Launchers for noisy top-k gating."""

import math
from typing import Any, NamedTuple

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

# Maximum number of columns in a block that holds whole rows. Wider rows are read in chunks of this
# size.
MAX_BLOCK_COLUMNS = 1024
# Number of values in a warp's part of such a block. With 8 values per thread, there are enough
# registers to run several blocks at a time.
WARP_NUMBERS = 256
# Rows and columns of a block, of one warp, in kernels that process each column by itself. With a
# few rows and columns, the few values that belong to whole rows keep most threads busy.
SUM_TILE, BACKWARD_TILE = (1, 256), (4, 64)
# Maximum number of warps. On the largest GPU, each multiprocessor gets 16, about as many as it can
# run at a time. Each block writes one row of partial sums, so more blocks would need more memory.
MAX_WARPS = 2048


class Choice(NamedTuple):
    """Results of the forward pass. C is K + 1 if the load is a smooth estimate, otherwise K.

    Attributes:
        gates: (N, K), the weights of the chosen experts.
        top: (N, C), the largest noisy logits, in descending order.
        ids: (N, C) int32, the columns of these logits.
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
        block: Number of rows and number of columns in a block.
        chunks: Number of blocks of columns in a row.
        warps: Number of warps per program.
    """

    splits: int
    block: tuple[int, int]
    chunks: int
    warps: int


def whole_rows(num_rows: int, num_groups: int, num_experts: int) -> Grid:
    """Choose blocks of whole rows, or of long chunks of rows.

    Args:
        num_rows: Number of rows, N.
        num_groups: Number of groups, G.
        num_experts: Number of experts, E.
    """
    block_columns = min(max(triton.next_power_of_2(num_experts), 16), MAX_BLOCK_COLUMNS)
    chunks = triton.cdiv(num_experts, block_columns)
    # A search in a chunk needs few registers, so one warp can search it alone.
    warps = max(block_columns // WARP_NUMBERS, 1) if chunks == 1 else 1
    block_rows = max(WARP_NUMBERS // block_columns, 1)
    splits = _split(num_rows, num_groups, block_rows, warps)
    return Grid(splits, (block_rows, block_columns), chunks, warps)


def tiles(num_rows: int, num_groups: int, num_experts: int, block: tuple[int, int]) -> Grid:
    """Distribute blocks of one warp; the other arguments are those of `whole_rows`."""
    splits = _split(num_rows, num_groups, block[0], 1)
    return Grid(splits, block, triton.cdiv(num_experts, block[1]), 1)


def _split(num_rows: int, num_groups: int, block_rows: int, warps: int) -> int:
    """Return the number of programs per group."""
    most = triton.cdiv(max(MAX_WARPS // warps, 1), num_groups)
    return max(min(triton.cdiv(num_rows, block_rows), most), 1)


def _constants(num_experts: int, top_k: int, count: int, noise_floor: float) -> tuple[Any, ...]:
    """Return the compile-time arguments TOP_K, COUNT, NOISE_FLOOR, MULTIPLE and SLOTS."""
    # Triton itself recognises only multiples of 16. A multiple of 4 lets a load read 4 values.
    multiple = math.gcd(16, num_experts)
    multiple = multiple if multiple >= 4 else 1
    return top_k, count, noise_floor, multiple, triton.next_power_of_2(count)


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
    sizes = num_rows, num_groups, num_experts
    rows = whole_rows(*sizes)
    grid = rows if rows.chunks == 1 else tiles(*sizes, SUM_TILE)
    gates, top = clean.new_empty(num_rows, top_k), clean.new_empty(num_rows, count)
    ids = torch.empty(num_rows, count, dtype=torch.int32, device=clean.device)
    shape = num_groups, grid.splits, num_experts
    importance, load = clean.new_empty(shape), clean.new_empty(shape if smooth else (1, 1, 1))
    counts = torch.empty(shape, dtype=torch.int32, device=clean.device)
    inputs = clean, _contiguous(raw_scale), _contiguous(noise)
    by_group = _contiguous(row_weight), row_offsets
    choice, sums = (gates, top, ids), (importance, load, counts)
    constants = _constants(num_experts, top_k, count, noise_floor)
    with torch.cuda.device_of(clean):
        if rows.chunks == 1:
            forward_kernel[(num_groups * grid.splits,)](
                *(*inputs, *by_group, *choice, *sums, seed, num_experts, grid.splits),
                *(*constants, *grid.block),
                num_warps=grid.warps,
            )
        else:
            select_kernel[(triton.cdiv(num_rows, rows.block[0]),)](
                *(*inputs, *choice, seed, num_rows, num_experts),
                *(*constants, *rows.block, rows.chunks),
                num_warps=rows.warps,
            )
            sum_kernel[(num_groups * grid.splits, grid.chunks)](
                *(*inputs[:2], *by_group, *choice, *sums, num_experts, grid.splits),
                *(*constants, *grid.block),
                num_warps=grid.warps,
            )
    # Each program has written its own row of sums. Add up these rows in a fixed order.
    return Choice(*choice, *(partial.sum(1) for partial in sums))


def gating_backward(
    clean: Tensor,
    raw_scale: Tensor | None,
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
    grid = tiles(num_rows, num_groups, num_experts, BACKWARD_TILE)
    constants = _constants(num_experts, gates.shape[1], ids.shape[1], noise_floor)
    grad_clean = torch.empty_like(clean)
    grad_raw = None if raw_scale is None else torch.empty_like(grad_clean)
    grad_weight = None if row_weight is None else clean.new_empty(num_rows)
    inputs = clean, _contiguous(raw_scale), _contiguous(row_weight), row_offsets
    with torch.cuda.device_of(clean):
        backward_kernel[(num_groups * grid.splits,)](
            *(*inputs, *choice, *(_contiguous(grad) for grad in grads)),
            *(grad_clean, grad_raw, grad_weight, num_experts, grid.splits),
            *(*constants, *grid.block, grid.chunks),
            num_warps=grid.warps,
        )
    return grad_clean, grad_raw, grad_weight


def write_noise(seed: Tensor, first_row: int, noise: Tensor) -> Tensor:
    """Fill `noise`, (N, E), with the noise that the kernels draw, beginning at row `first_row`."""
    num_rows, num_experts = noise.shape
    grid = tiles(num_rows, 1, num_experts, SUM_TILE)
    with torch.cuda.device_of(noise):
        noise_kernel[(triton.cdiv(num_rows, grid.block[0]), grid.chunks)](
            *(noise, seed, first_row, num_rows, num_experts, *grid.block), num_warps=grid.warps
        )
    return noise


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
