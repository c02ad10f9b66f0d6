"""Kernels for one matrix product per expert; `grouped_gemm` launches them."""

import triton
import triton.language as tl

from nmt_moe.kernels._triton.hints import whole


@triton.jit
def multiply_kernel(
    rows,
    weight,
    out,
    mask,
    expert_offsets,
    tile_expert,
    first_tile,
    num_experts,
    inner_dim,
    out_dim,
    row_stride,
    row_inner_stride,
    expert_stride,
    inner_stride,
    out_stride,
    RELU: tl.constexpr,
    MASKED: tl.constexpr,
    ADDS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Multiply one tile of rows by one block of columns of its expert's matrix."""
    if MULTIPLE > 1:
        inner_dim, out_dim = whole(inner_dim, MULTIPLE), whole(out_dim, MULTIPLE)
        row_stride = whole(row_stride, MULTIPLE)
        expert_stride = whole(expert_stride, MULTIPLE)
        if IS_TRANSPOSED:
            out_stride = whole(out_stride, MULTIPLE)
        else:
            inner_stride = whole(inner_stride, MULTIPLE)
    # Consecutive programs compute the column blocks of one tile, so they share its rows. The next
    # tile often belongs to the same expert and finds the weights in the cache.
    pid = tl.program_id(0)
    columns = tl.cdiv(out_dim, BLOCK_OUT)
    tile = pid // columns
    expert = tl.load(tile_expert + tile)  # int64, like everything that is multiplied by a stride
    if expert >= num_experts:
        return
    first_row = tl.load(expert_offsets + expert)
    first_row += (tile - tl.load(first_tile + expert)) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = (pid % columns).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_INNER).to(tl.int64)
    is_row = row < tl.load(expert_offsets + expert + 1)
    is_column = column < out_dim
    at_rows = rows + row[:, None] * row_stride + inner[None, :] * row_inner_stride
    at_weight = weight + expert * expert_stride
    at_weight += inner[:, None] * inner_stride + column[None, :] * out_stride
    advance = tl.full((), BLOCK_INNER, tl.int64)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, inner_dim, BLOCK_INNER):
        is_inner = inner < inner_dim - start
        left = tl.load(at_rows, mask=is_row[:, None] & is_inner[None, :], other=0)
        right = tl.load(at_weight, mask=is_inner[:, None] & is_column[None, :], other=0)
        if INTERPRETED:  # the interpreter multiplies bfloat16 incorrectly
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        at_rows += advance * row_inner_stride
        at_weight += advance * inner_stride
    at_out = row[:, None] * out_dim + column[None, :]
    inside = is_row[:, None] & is_column[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # keeps NaN, as torch.relu does
    if MASKED:
        relu_output = tl.load(mask + at_out, mask=inside, other=0).to(tl.float32)
        # Without the addition of 0.0, ptxas would move the selection into the products and then
        # serialise them.
        acc = tl.where(relu_output <= 0, 0.0, acc + 0.0)
    if ADDS:
        acc += tl.load(out + at_out, mask=inside, other=0).to(tl.float32)
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    rows,
    grad,
    out,
    expert_offsets,
    dim,
    out_dim,
    row_stride,
    row_dim_stride,
    grad_stride,
    grad_dim_stride,
    expert_stride,
    dim_stride,
    out_stride,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Compute one block of the gradient of one expert's matrix."""
    if MULTIPLE > 1:
        dim, out_dim = whole(dim, MULTIPLE), whole(out_dim, MULTIPLE)
        row_stride = whole(row_stride, MULTIPLE)
        grad_stride = whole(grad_stride, MULTIPLE)
        expert_stride = whole(expert_stride, MULTIPLE)
        dim_stride = whole(dim_stride, MULTIPLE)
    pid = tl.program_id(0)
    columns = tl.cdiv(out_dim, BLOCK_OUT)
    tiles = tl.cdiv(dim, BLOCK_DIM) * columns
    expert = (pid // tiles).to(tl.int64)
    tile = (pid % tiles).to(tl.int64)
    inner = tile // columns * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    column = tile % columns * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_inner, is_column = inner < dim, column < out_dim
    start = tl.load(expert_offsets + expert)
    num_rows = (tl.load(expert_offsets + expert + 1) - start).to(tl.int32)
    step = tl.arange(0, BLOCK_ROWS)
    # If the expert has no rows, the sum stays 0.
    acc = tl.zeros((BLOCK_DIM, BLOCK_OUT), dtype=tl.float32)
    for done in range(0, num_rows, BLOCK_ROWS):
        is_row = step < num_rows - done
        row = start + done + step
        at_rows = rows + row[None, :] * row_stride + inner[:, None] * row_dim_stride
        at_grad = grad + row[:, None] * grad_stride + column[None, :] * grad_dim_stride
        left = tl.load(at_rows, mask=is_inner[:, None] & is_row[None, :], other=0)
        right = tl.load(at_grad, mask=is_row[:, None] & is_column[None, :], other=0)
        if INTERPRETED:  # the interpreter multiplies bfloat16 incorrectly
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    at_out = out + expert * expert_stride
    at_out += inner[:, None] * dim_stride + column[None, :] * out_stride
    inside = is_inner[:, None] & is_column[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def zero_kernel(
    weight_grad,
    expert_offsets,
    size,
    BLOCK: tl.constexpr,
):
    """Fill the gradient of an expert with 0 if it has no rows.

    The elements are divided among several programs.
    """
    expert = tl.program_id(0).to(tl.int64)
    if tl.load(expert_offsets + expert + 1) > tl.load(expert_offsets + expert):
        return
    for start in range(tl.program_id(1).to(tl.int64) * BLOCK, size, tl.num_programs(1) * BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        zeros = tl.zeros((BLOCK,), dtype=weight_grad.dtype.element_ty)
        tl.store(weight_grad + expert * size + index, zeros, mask=index < size)
