"""Launchers for one matrix product per expert, over rows sorted by expert.

Block sizes were chosen by reasoning, not by tuning, because no GPU was available. With t rows per
expert, a pass over the weights does about t multiply-adds for each element read, and an H100 or
H200 needs about 200 of them (in bfloat16) before arithmetic, rather than memory, becomes the
bottleneck. With up to 32 rows per expert, it therefore matters only that each expert's matrix is
read once, so blocks have few rows and are narrow enough to leave registers and shared memory for
loads in flight. Above 128 rows per expert, blocks have the size that suits the tensor cores. In
between, blocks have 64 rows, enough to hold all rows of most experts up to a mean of about 60.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nmt_moe.kernels._backend import INTERPRETED
from nmt_moe.kernels._triton.grouped_gemm_kernels import (
    multiply_kernel,
    weight_gradient_kernel,
    zero_kernel,
)

# About this many programs compute the gradient of a matrix that all rows share, which is a few for
# each multiprocessor of the largest GPU. Each program sums over at least PART_ROWS rows.
PROGRAMS, PART_ROWS = 512, 256


@dataclass(frozen=True)
class TileList:
    """The blocks of rows (tiles) and their experts.

    The list stays on the device, so that the CPU does not wait for it. It has as many tiles as any
    routing could need.

    Attributes:
        block_rows: Number of rows in a tile.
        expert: (tiles,) int64, the expert of each tile; L in surplus tiles.
        first_tile: (L,) int64, the first tile of each expert. Its other tiles follow.
    """

    block_rows: int
    expert: Tensor
    first_tile: Tensor


class BlockShape(NamedTuple):
    """The division of a product over a given number of rows into blocks.

    Attributes:
        inner: Block size along D, the dimension that one step sums over.
        out: Block size along F.
        warps: Number of warps that share a block.
        stages: Number of loads in flight, plus one.
    """

    inner: int
    out: int
    warps: int
    stages: int


def list_tiles(expert_offsets: Tensor, num_rows: int, block_rows: int) -> TileList:
    """Cut each expert's rows into blocks.

    Args:
        expert_offsets: (L + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]).
        num_rows: Total number of rows, R.
        block_rows: Number of rows in a block.
    """
    num_experts = len(expert_offsets) - 1
    if num_experts == 1:  # the same list as below, in fewer operations
        tiles = max(triton.cdiv(num_rows, block_rows), 1)
        expert = torch.zeros(tiles, dtype=torch.int64, device=expert_offsets.device)
        return TileList(block_rows, expert, expert[:1])
    first_tile = torch.zeros_like(expert_offsets)
    tiles = expert_offsets.diff().add_(block_rows - 1).div_(block_rows, rounding_mode="floor")
    torch.cumsum(tiles, 0, out=first_tile[1:])
    # The last block of each expert may be partly empty.
    bound = triton.cdiv(num_rows, block_rows) + min(num_experts, num_rows)
    tile = torch.arange(bound, device=expert_offsets.device)
    expert = torch.searchsorted(first_tile[1:], tile, right=True)
    return TileList(block_rows, expert, first_tile[:-1])


def choose_block_rows(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return the number of rows in a block, based on the mean number of rows per expert.

    The module's docstring gives the reasons.
    """
    # Row counts vary around their mean, and if an expert has one row more than a block holds, its
    # matrix is read twice. These block sizes leave room for that: if counts follow a Poisson
    # distribution, a matrix is read at most 1.1 times on average up to a mean of 55 rows, and 2.5
    # times at a mean of 128.
    for most, block_rows in ((8, 16), (20, 32), (128, 64)):
        if num_rows <= most * num_experts:
            return block_rows
    # float32 runs outside the tensor cores, where a larger block only spills registers.
    return 64 if dtype == torch.float32 else 128


def multiply_rows(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    tiles: TileList,
    relu: bool = False,
    mask: Tensor | None = None,
    add_to: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Multiply each row by its expert's matrix, with sums in float32.

    Args:
        rows: (R, D), sorted by expert.
        weight: (L, D, F), the experts' matrices, in the dtype of `rows`. Any strides are allowed,
            so a transposed view needs no copy.
        expert_offsets: (L + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]).
        tiles: Result of `list_tiles` for `expert_offsets`.
        relu: Whether to apply a ReLU to the product.
        mask: (R, F). The result is 0 where the mask is 0 or less. To apply a ReLU's gradient,
            pass the ReLU's output as the mask.
        add_to: (R, F), contiguous; the products are added to it in place. None for a new tensor.
        precision: How `tl.dot` rounds float32: "ieee", "tf32" or "tf32x3"; None to follow torch's
            setting.

    Returns:
        (R, F), the products, in the dtype of `rows`; `add_to` if it is given.
    """
    num_rows, inner_dim = rows.shape
    num_experts, _, out_dim = weight.shape
    out = add_to
    if out is None:
        out = torch.empty((num_rows, out_dim), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    shape = choose_shape(tiles.block_rows, inner_dim, out_dim, rows.dtype)
    with torch.cuda.device_of(rows):
        multiply_kernel[(len(tiles.expert) * triton.cdiv(out_dim, shape.out),)](
            rows,
            weight,
            out,
            out if mask is None else mask,
            expert_offsets,
            tiles.expert,
            tiles.first_tile,
            num_experts,
            inner_dim,
            out_dim,
            *rows.stride(),
            *weight.stride(),
            relu,
            mask is not None,
            add_to is not None,
            precision or _input_precision(rows.dtype),
            INTERPRETED,
            _multiple(rows, weight),
            weight.stride(1) == 1,
            tiles.block_rows,
            shape.inner,
            shape.out,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return out


def weight_gradient(
    rows: Tensor,
    grad: Tensor,
    expert_offsets: Tensor,
    block_rows: int,
    precision: str | None = None,
) -> Tensor:
    """Compute rows^T @ grad for each expert; the result is 0 for experts without rows.

    Args:
        rows: (R, D), sorted by expert.
        grad: (R, F), the gradient of the products, in the dtype of `rows`.
        expert_offsets: (L + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]).
        block_rows: Largest number of rows that one step sums over.
        precision: As in `multiply_rows`.

    Returns:
        (L, D, F), the gradient of the experts' matrices, in the dtype of `rows`.
    """
    num_experts = len(expert_offsets) - 1
    dim, out_dim = rows.shape[1], grad.shape[1]
    out = torch.empty((num_experts, dim, out_dim), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    is_wide = rows.dtype == torch.float32
    block_dim, block_out = (_fit(64 if is_wide else 128, size) for size in (dim, out_dim))
    tiles = triton.cdiv(dim, block_dim) * triton.cdiv(out_dim, block_out)
    with torch.cuda.device_of(rows):
        weight_gradient_kernel[(num_experts * tiles,)](
            rows,
            grad,
            out,
            expert_offsets,
            dim,
            out_dim,
            *rows.stride(),
            *grad.stride(),
            *out.stride(),
            precision or _input_precision(rows.dtype),
            INTERPRETED,
            _multiple(rows, grad),
            min(block_rows, 32 if is_wide else 64),
            block_dim,
            block_out,
            num_warps=4 if is_wide else 8,
            num_stages=3,
        )
    return out


def one_weight_gradient(
    rows: Tensor, grad: Tensor, block_rows: int, precision: str | None = None
) -> Tensor:
    """Compute rows^T @ grad for a matrix that all rows share: (R, D), (R, F) -> (1, D, F).

    One program for each block of the matrix would leave most of a GPU idle, so the rows are cut
    into parts, and the parts' gradients are added up in a fixed order. The other arguments are
    those of `weight_gradient`.
    """
    num_rows = max(len(rows), 1)
    blocks = triton.cdiv(rows.shape[1], 64) * triton.cdiv(grad.shape[1], 64)
    parts = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(num_rows, PART_ROWS))
    size = triton.cdiv(num_rows, parts)
    offsets = torch.arange(0, parts * size + 1, size, device=rows.device).clamp_(max=len(rows))
    by_part = weight_gradient(rows, grad, offsets, block_rows, precision)
    return by_part if parts == 1 else by_part.sum(0, keepdim=True)


def zero_idle_experts(weight_grad: Tensor, expert_offsets: Tensor) -> None:
    """Fill the gradients of experts without rows with 0, in place, without changing the others.

    Args:
        weight_grad: (L, D, F), the gradient of the experts' matrices; contiguous.
        expert_offsets: (L + 1,) int64. Expert e owns rows [offsets[e], offsets[e + 1]).
    """
    size, block = weight_grad[0].numel(), 4096
    with torch.cuda.device_of(weight_grad):
        zero_kernel[(len(weight_grad), min(16, triton.cdiv(size, block)))](
            weight_grad, expert_offsets, size, block
        )


def _fit(block: int, size: int) -> int:
    """Shrink a block to fit a smaller dimension, but not below 16, which tensor cores need."""
    return max(16, min(block, triton.next_power_of_2(size)))


def choose_shape(block_rows: int, inner_dim: int, out_dim: int, dtype: torch.dtype) -> BlockShape:
    """Choose a product's block shape.

    Each step reads 128 bytes of each row, which is the length of a cache line.
    """
    is_wide = dtype == torch.float32
    inner, out = _fit(32 if is_wide else 64, inner_dim), _fit(64 if is_wide else 128, out_dim)
    warps = 8 if block_rows * out > 64 * 128 else 4
    # Small blocks leave shared memory for one more load in flight.
    return BlockShape(inner, out, warps, stages=4 if block_rows <= 32 else 3)


def _multiple(rows: Tensor, matrix: Tensor) -> int:
    """Return the larger of 16 and 8 that divides all widths, and all strides other than 1.

    Return 1 if neither divides them, or if an operand is not contiguous (a transposed matrix counts
    as contiguous). Triton itself looks only for multiples of 16; without this hint, it would load
    rows of a width such as 1000 one element at a time.
    """
    is_transposed = matrix.dim() == 3 and matrix.mT.is_contiguous()
    if not rows.is_contiguous() or not (matrix.is_contiguous() or is_transposed):
        return 1
    widths = matrix.shape[1:] if matrix.dim() == 3 else (rows.shape[1], matrix.shape[1])
    # Check strides as well as widths, because the stride of a dimension of size 1 may be anything.
    factor = math.gcd(16, *widths, rows.stride(0), matrix.stride(0))
    return factor if factor >= 8 else 1


def _input_precision(dtype: torch.dtype) -> str:
    """Return how products round their inputs; float32 is rounded only if torch allows it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch may have two settings. Once the newer setting has been set, reading the older setting
    # raises an error, and so does `torch.get_float32_matmul_precision`. The newer setting reflects
    # changes to both.
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"
