"""The backward pass of `combine_rows` in Triton. Its forward pass is `gather_rows.sum_rows`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmt_moe.kernels._triton.gather_rows import choose_blocks


def combine_rows_backward(
    grad_y: Tensor, rows: Tensor, gates: Tensor, token_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute gate * grad_y for each row, and the dot product of grad_y and the row for each gate.

    Each row belongs to one slot of one token, so its gradient is written once, without atomics.

    Args:
        grad_y: (N, D), the gradient of the combined outputs.
        rows: (R, D), the experts' outputs.
        gates: (N, K), the weights of the chosen experts.
        token_rows: (N, K) int64, the rows of each token; R in an empty slot. Every row occurs
            exactly once.

    Returns:
        grad_rows: (R, D), in the dtype of `rows`.
        grad_gates: (N, K), in the dtype of `gates`; 0 in empty slots.
    """
    grad_y, rows = grad_y.contiguous(), rows.contiguous()
    gates, token_rows = gates.contiguous(), token_rows.contiguous()
    grad_rows, grad_gates = torch.empty_like(rows), torch.empty_like(gates)
    num_tokens, num_slots = gates.shape
    if gates.numel() == 0:
        return grad_rows, grad_gates
    dim = rows.shape[1]
    block_tokens, block_dim = choose_blocks(max(dim, 1))
    with torch.cuda.device_of(rows):
        _combine_backward_kernel[(triton.cdiv(num_tokens, block_tokens) * num_slots,)](
            grad_y,
            rows,
            gates,
            token_rows,
            grad_rows,
            grad_gates,
            num_tokens,
            len(rows),
            num_slots,
            dim,
            block_tokens,
            block_dim,
        )
    return grad_rows, grad_gates


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _combine_backward_kernel(
    grad_y,
    rows,
    gates,
    token_rows,
    grad_rows,
    grad_gates,
    num_tokens,
    num_rows,
    num_slots,
    dim,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    # Neighbouring programs handle the K slots of the same tokens, so they find grad_y in the cache.
    pid = tl.program_id(0)
    token = (pid // num_slots).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slot = token * num_slots + pid % num_slots
    is_token = token < num_tokens
    row = tl.load(token_rows + slot, mask=is_token, other=num_rows)
    gate = tl.load(gates + slot, mask=is_token, other=0).to(tl.float32)
    dot = tl.zeros((BLOCK_TOKENS,), dtype=tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        column = start + tl.arange(0, BLOCK_DIM)
        inside = (row < num_rows)[:, None] & (column < dim)[None, :]
        at_row = row[:, None] * dim + column[None, :]
        grad = tl.load(grad_y + token[:, None] * dim + column[None, :], mask=inside, other=0)
        grad = grad.to(tl.float32)
        vector = tl.load(rows + at_row, mask=inside, other=0).to(tl.float32)
        dot += tl.sum(grad * vector, axis=1)
        grad *= gate[:, None]
        tl.store(grad_rows + at_row, grad.to(grad_rows.dtype.element_ty), mask=inside)
    tl.store(grad_gates + slot, dot.to(grad_gates.dtype.element_ty), mask=is_token)
