"""Update expert matrices with Adam, without a first moment and with a factored second moment."""

import math

import torch
from torch import Tensor

from nmt_moe.checks import check_shape
from nmt_moe.kernels._backend import uses_triton
from nmt_moe.kernels._cpu import has_compiled_loops, load

# Number of elements in a block. On a CPU, 4 MiB of float32 and the same amount of scratch stay in
# the cache between passes. With smaller blocks, starting two threads would cost too much. A GPU
# needs even larger blocks.
CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 26
# Number of blocks whose means are all updated before any of their weights.
GROUP = 4


def factored_adam(
    weight: Tensor,
    grad: Tensor,
    row_mean: Tensor,
    column_mean: Tensor,
    *,
    step: int,
    lr: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """Update expert matrices and their running means of squared gradients, in place.

    Each matrix is updated independently. Its second moment is outer(row_mean, column_mean) /
    mean(row_mean). The square root of the second moment is the product of a column vector and a row
    vector. If all means of a matrix are 0, it changes only by weight decay. No tensor of the
    weights' size is created, and repeated runs are bit-identical.

    Args:
        weight: (E, D, H), the experts' matrices; updated in place.
        grad: (E, D, H), their gradients. An expert without tokens has a gradient of 0, so its means
            only decay.
        row_mean: (E, D), running means of the squared gradient over each row; updated in place.
            These means, and all arithmetic, are float64 for float64 weights, otherwise float32.
        column_mean: (E, H), running means over each column; updated in place.
        step: Number of this update, counted from 1, for the bias correction.
        lr: Learning rate.
        beta2: Decay rate of the running means, which is the weight of the old mean in the new mean.
        eps: Constant added to the square root of the second moment before its bias correction.
        weight_decay: Before the update, the weights shrink by the fraction `lr * weight_decay`.

    Raises:
        ValueError: if the shapes do not match.

    Source: Shazeer et al. 2017, Appendix D.
    """
    check_shape("weight", weight, (None, None, None), "(E, D, H)")
    num_experts, model_dim, hidden_dim = weight.shape
    check_shape("grad", grad, weight.shape, "(E, D, H)")
    check_shape("row_mean", row_mean, (num_experts, model_dim), "(E, D)")
    check_shape("column_mean", column_mean, (num_experts, hidden_dim), "(E, H)")
    if weight.numel() == 0:
        return
    means = row_mean, column_mean
    step_size, keep = lr * math.sqrt(1 - beta2**step), 1 - lr * weight_decay
    if weight.is_contiguous() and uses_triton(weight, "factored_adam"):
        from nmt_moe.kernels._triton import factored_adam as kernel

        factors = float(step_size), float(beta2), float(eps), float(keep)
        kernel.factored_adam(weight, grad.contiguous(), *means, *factors)
        return
    tensors = weight, grad, *means
    if has_compiled_loops(*tensors) and all(tensor.is_contiguous() for tensor in tensors):
        load().factored_adam(*tensors, step_size, beta2, eps, keep)
        return
    block = GPU_BLOCK if weight.is_cuda else CPU_BLOCK
    # A block contains as many experts as fit into it, or some rows of one expert.
    count = max(1, min(num_experts, block // (model_dim * hidden_dim)))
    rows = max(1, min(model_dim, block // hidden_dim))
    scratch = row_mean.new_empty(count, rows, hidden_dim)
    for first in range(0, num_experts, GROUP * count):
        group = slice(first, first + GROUP * count)
        group_means = row_mean[group], column_mean[group]
        _update_means(grad[group], *group_means, beta2, scratch)
        _update_weight(weight[group], grad[group], *group_means, step_size, eps, keep, scratch)


def _update_means(
    grad: Tensor, row_mean: Tensor, column_mean: Tensor, beta2: float, scratch: Tensor
) -> None:
    """Update the means of a group of experts with their squared gradients."""
    count, rows, hidden_dim = scratch.shape
    row_sum, column_sum = torch.empty_like(row_mean), torch.zeros_like(column_mean)
    # Sums are computed as products with ones, which read their matrix faster than torch.sum.
    ones = scratch.new_ones(max(rows, hidden_dim))
    for part, part_rows, part_columns in zip(
        grad.split(count), row_sum.split(count), column_sum.split(count), strict=True
    ):
        blocks = zip(part.split(rows, 1), part_rows.split(rows, 1), strict=True)
        for block, block_sum in blocks:
            squares = scratch[: len(block), : block.shape[1]]
            torch.square(block.to(scratch.dtype), out=squares)
            torch.matmul(squares, ones[:hidden_dim], out=block_sum)
            left = ones[: block.shape[1]].expand(len(block), 1, -1)
            part_columns.unsqueeze(1).baddbmm_(left, squares)
    row_mean.mul_(beta2).add_(row_sum, alpha=(1 - beta2) / hidden_dim)
    column_mean.mul_(beta2).add_(column_sum, alpha=(1 - beta2) / grad.shape[1])


def _update_weight(
    weight: Tensor,
    grad: Tensor,
    row_mean: Tensor,
    column_mean: Tensor,
    step_size: float,
    eps: float,
    keep: float,
    scratch: Tensor,
) -> None:
    """Update the weights of a group of experts."""
    count, rows, _ = scratch.shape
    tiny = torch.finfo(row_mean.dtype).tiny  # replaces a mean of 0, because 0 / tiny is 0
    row_root = (row_mean / row_mean.mean(1, keepdim=True).clamp_min(tiny)).sqrt_()
    # (root, 1) times (root, eps) is the product of the roots, plus eps, in one pass.
    left = torch.stack([row_root, torch.ones_like(row_root)], 2)
    right = torch.stack([column_mean.sqrt(), torch.full_like(column_mean, eps)], 1)
    for *parts, part_right in zip(
        *(tensor.split(count) for tensor in (weight, grad, left, right)), strict=True
    ):
        for block, block_grad, block_left in zip(
            *(part.split(rows, 1) for part in parts), strict=True
        ):
            root = scratch[: len(block), : block.shape[1]]
            torch.bmm(block_left, part_right, out=root)
            moved = block.to(root.dtype)  # shares memory if the dtype is the same
            if keep != 1:
                moved.mul_(keep)
            moved.addcdiv_(block_grad.to(root.dtype), root, value=-step_size)
            if moved.dtype != block.dtype:
                block.copy_(moved)
