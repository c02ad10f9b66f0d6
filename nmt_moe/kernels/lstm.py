"""Run all steps of a projected LSTM on the CPU, in compiled loops."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.kernels._cpu import load
from nmt_moe.kernels._matmul import matmul, multiply_into

# Minimum number of steps for which copying the transposed recurrent weights saves time. The product
# of a few rows and a transposed view takes up to 1.5 times as long as a product with a matrix that
# is stored in the order in which it is read.
FEWEST_STEPS = 4


def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    weight_hr: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Run an LSTM over all steps.

    Each step runs only the recurrent products and one fused point-wise loop. One product over
    all steps computes the input's part of the gates, and one computes the gradient of each weight.
    Sums run in a fixed order, so the same inputs give bit-identical results.

    Args:
        x: (T, B, I) float32 or float64 on the CPU. `has_compiled_loops` must return True for all
            tensor arguments.
        weight_ih: (4 H, I), weights of the input, with the gates in torch's order i, f, g, o.
        weight_hh: (4 H, D), weights of the previous output, in the same order.
        bias: (4 H,), the sum of torch's two biases.
        weight_hr: (D, H), the projection; None if outputs are not projected, so that D = H.
        state: Output (B, D) and cells (B, H) of the previous step; None for zeros.

    Returns:
        (T, B, D) outputs, and the last step's (B, H) cells.

    Source: Sak et al. 2014 (without peepholes).
    """
    hidden, cell = (None, None) if state is None else state
    outputs: tuple[Tensor, Tensor] = _LSTM.apply(
        x, weight_ih, weight_hh, bias, weight_hr, hidden, cell
    )
    return outputs


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor,
        weight_hr: Tensor | None,
        first_hidden: Tensor | None,
        first_cell: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        num_steps, batch, _ = x.shape
        width, output_dim = weight_hh.shape[0] // 4, weight_hh.shape[1]
        gates = x.new_empty((num_steps, batch, 4 * width))
        gates.copy_(bias)
        multiply_into(gates.flatten(0, 1), x.flatten(0, 1), weight_ih.t(), accumulate=True)
        outputs = x.new_empty((num_steps + 1, batch, output_dim))
        cells = x.new_empty((num_steps + 1, batch, width))
        for states, first in ((outputs, first_hidden), (cells, first_cell)):
            states[0] = 0.0 if first is None else first
        hidden = outputs[1:]
        if weight_hr is not None:
            hidden = x.new_empty((num_steps, batch, width))
        right = right_operands(num_steps, weight_hh, weight_hr)
        load().lstm_forward(gates, *right, cells, hidden, outputs)
        ctx.save_for_backward(x, weight_ih, weight_hh, weight_hr, gates, cells, hidden, outputs)
        ctx.set_materialize_grads(False)
        return outputs[1:], cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_above: Tensor | None, grad_last_cell: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight_ih, weight_hh, weight_hr, gates, cells, hidden, outputs = ctx.saved_tensors
        grad_outputs = x.new_empty(outputs[1:].shape)
        grad_gates = x.new_empty(gates.shape)
        grad_hidden, grad_cell = x.new_empty(outputs.shape[1:]), x.new_empty(cells.shape[1:])
        for total, above in ((grad_outputs, grad_above), (grad_cell, grad_last_cell)):
            total.copy_(x.new_zeros(()) if above is None else above)
        load().lstm_backward(
            gates, cells, weight_hh, weight_hr, grad_outputs, grad_cell, grad_gates, grad_hidden
        )
        needs = ctx.needs_input_grad
        flat = grad_gates.flatten(0, 1)
        return (
            matmul(flat, weight_ih).view_as(x) if needs[0] else None,
            weight_gradient(flat, x) if needs[1] else None,
            weight_gradient(flat, outputs[:-1]) if needs[2] else None,
            flat.sum(0) if needs[3] else None,
            weight_gradient(grad_outputs, hidden) if needs[4] else None,
            grad_hidden if needs[5] else None,
            grad_cell if needs[6] else None,
        )


def right_operands(num_steps: int, *weights: Tensor | None) -> list[Tensor | None]:
    """Transpose weights from (O, I) to (I, O), and copy them if there are enough steps."""
    turned = [None if weight is None else weight.t() for weight in weights]
    if num_steps < FEWEST_STEPS:
        return turned
    return [None if weight is None else weight.contiguous() for weight in turned]


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """Compute grad^T @ rows over all leading dimensions: (..., O), (..., I) -> (O, I)."""
    grad, rows = grad.reshape(-1, grad.shape[-1]), rows.reshape(-1, rows.shape[-1])
    out = rows.new_empty((grad.shape[1], rows.shape[1]))
    return multiply_into(out, grad.t(), rows)
