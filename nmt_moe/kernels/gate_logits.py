"""Compute a gate's clean logits and the values that determine the scale of its noise."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.checks import check_shape
from nmt_moe.kernels._backend import is_on_host, uses_triton
from nmt_moe.kernels._products import LoopProducts, Products, TritonProducts, choose_products


def gate_logits(
    rows: Tensor,
    gate_weight: Tensor,
    noise_weight: Tensor | None,
    row_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply rows by their gate's two matrices, one for the logits and one for the noise scale.

    The backward pass adds up the two products' gradients of `rows` in place instead of creating an
    (N, D) tensor for each, and keeps their dtype even under autocast. If a group has no rows, its
    gradient is only filled with zeros.

    On a GPU, a product of float32 matrices is computed as three products of TF32 numbers (TF32x3),
    because arithmetic on tensor cores is much faster than ordinary float32 arithmetic. The results
    are about as accurate as in float32. If torch's precision for float32 products has been set
    explicitly, with `torch.set_float32_matmul_precision` or
    `torch.backends.cuda.matmul.fp32_precision`, that setting takes precedence; "highest", for
    example, gives float32 arithmetic. Versions of torch that lack `fp32_precision` always use
    float32 arithmetic.

    Args:
        rows: (N, D), the tokens' vectors.
        gate_weight: (D, E), the gate's weights; with `row_offsets`, (G, D, E), one matrix for each
            group.
        noise_weight: Weights for the noise scale, with the shape of `gate_weight`; None for no
            noise.
        row_offsets: (G + 1,) int64; group g owns rows [offsets[g], offsets[g + 1]). If None, all
            rows are multiplied by the same matrices.

    Returns:
        clean: (N, E), rows @ gate_weight.
        raw_scale: (N, E), rows @ noise_weight, or None.

    Raises:
        ValueError: if shapes do not match.
    """
    if row_offsets is None:
        check_shape("gate_weight", gate_weight, (rows.shape[1], None), "(D, E)")
        gate_weight = gate_weight.unsqueeze(0)
        noise_weight = None if noise_weight is None else noise_weight.unsqueeze(0)
    else:
        check_shape("row_offsets", row_offsets, (len(gate_weight) + 1,), "(G + 1,)")
        shape = len(row_offsets) - 1, rows.shape[1], None
        check_shape("gate_weight", gate_weight, shape, "(G, D, E)")
    if noise_weight is not None:
        check_shape("noise_weight", noise_weight, gate_weight.shape, "(G, D, E)")
    products = _choose_products(rows, gate_weight, row_offsets)
    return _GateLogits.apply(rows, gate_weight, noise_weight, products)


def _choose_products(rows: Tensor, weight: Tensor, row_offsets: Tensor | None) -> Products:
    """Choose how to multiply, without waiting for a device."""
    num_rows = len(rows)
    may_split = num_rows > 0 and rows.dtype == torch.float32 and _leaves_float32_open()
    if may_split and uses_triton(rows, "gate_logits"):
        if row_offsets is None:
            row_offsets = torch.arange(0, num_rows + 1, num_rows, device=rows.device)
        return TritonProducts(row_offsets, num_rows, rows.dtype, "tf32x3")
    if row_offsets is None:
        return LoopProducts([0, num_rows])
    if is_on_host(rows):
        return LoopProducts(row_offsets.tolist())
    return choose_products(rows, weight, row_offsets)


def _leaves_float32_open() -> bool:
    """Return whether torch has no explicit precision for products of float32 matrices on a GPU."""
    return getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "none"


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gate_weight: Tensor,
        noise_weight: Tensor | None,
        products: Products,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.products = products
        ctx.save_for_backward(rows, gate_weight, noise_weight)
        ctx.set_materialize_grads(False)
        clean = products.multiply(rows, gate_weight)
        return clean, None if noise_weight is None else products.multiply(rows, noise_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        products: Products = ctx.products
        needed = [
            (grad.contiguous(), weight)
            for grad, weight in zip(grads, weights, strict=True)
            if grad is not None
        ]
        grad_rows = None
        if ctx.needs_input_grad[0]:
            for grad, weight in needed:
                grad_rows = products.multiply_back(grad, weight, add_to=grad_rows)
        grad_weights = [
            None if grad is None else products.weight_gradient(rows, grad.contiguous())
            for grad in grads
        ]
        return grad_rows, *grad_weights, None
