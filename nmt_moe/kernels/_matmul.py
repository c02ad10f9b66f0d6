"""Matrix products on the CPU, written into existing tensors.

torch multiplies float32 matrices with MKL, which is made for Intel's processors and does not use
the full vector width of other processors. On other processors, this package's compiled loops are
faster: with AVX-512 and many rows, they take half the time (`benchmarks/results/cpu.md`).
"""

import torch
from torch import Tensor

from nmt_moe.kernels._cpu import has_loops_for, load


def multiply_into(
    out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool = False, relu: bool = False
) -> Tensor:
    """Compute out = left @ right, or out += left @ right, and return `out`.

    Args:
        out: (M, N) or (C, M, N), with each row contiguous in memory.
        left: (M, K) or (C, M, K).
        right: (K, N) or (C, K, N).
        accumulate: Whether to add the product to `out`.
        relu: Whether to replace negative results with 0.
    """
    if has_loops_for(out, left, right):  # autocast does not affect in-place products
        load().multiply_into(left, right, out, accumulate, relu)
        return out
    if accumulate:
        (out.baddbmm_ if out.dim() == 3 else out.addmm_)(left, right)
    else:
        (torch.bmm if out.dim() == 3 else torch.mm)(left, right, out=out)
    return out.relu_() if relu else out


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, of shape (M, N), for matrices of shapes (M, K) and (K, N)."""
    return multiply_into(left.new_empty(left.shape[0], right.shape[1]), left, right)
