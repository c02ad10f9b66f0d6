"""Run all steps of an LSTM with attention on the CPU, in compiled loops."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmt_moe.kernels._cpu import load
from nmt_moe.kernels._matmul import matmul, multiply_into
from nmt_moe.kernels.lstm import right_operands, weight_gradient


def attentive_lstm(
    x: Tensor,
    weight_x: Tensor,
    bias: Tensor,
    weight_recurrent: Tensor,
    projection: Tensor | None,
    weight_query: Tensor,
    scale: Tensor,
    keys: Tensor,
    source: Tensor,
    padding_mask: Tensor,
    state: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM with the input [x; context of the previous output] at each step.

    Each step computes only the values that depend on the previous step. The product of x and its
    weights, and the gradients of the weights, the keys and the source, are each computed over all
    steps together. Sums run in a fixed order, so the same inputs give bit-identical results.

    Args:
        x: (T, B, D) float32 or float64 on the CPU. `has_compiled_loops` must return True for all
            tensor arguments except the mask.
        weight_x: (4 H, D), weights of x, with the gates in torch's order i, f, g, o.
        bias: (4 H,), added to the gates before their activation.
        weight_recurrent: (4 H, 2 D), weights of the context, followed by weights of the previous
            output.
        projection: (D, H); None if outputs are not projected, so that D = H.
        weight_query: (D, D), the attention's matrix W.
        scale: (D,), the attention's vector V.
        keys: (B, S, D), the part of the attention function that depends only on the source.
        source: (B, S, D), the encoder's outputs.
        padding_mask: (B, S) bool, True for padding, which gets a weight of 0.
        state: Output (B, D) and cells (B, H) of the previous step.

    Returns:
        (T, B, D) outputs, (B, T, S) attention weights, and the last step's (B, H) cells.

    Source: Shazeer et al. 2017, Appendix E, eq. 22; Wu et al. 2016, section 3.
    """
    outputs, weights, cell = _AttentiveLSTM.apply(
        x,
        weight_x,
        bias,
        weight_recurrent,
        projection,
        weight_query,
        scale,
        keys.contiguous(),
        source.contiguous(),
        padding_mask.contiguous(),
        *state,
    )
    return outputs, weights.transpose(0, 1), cell


class _AttentiveLSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_x: Tensor,
        bias: Tensor,
        weight_recurrent: Tensor,
        projection: Tensor | None,
        weight_query: Tensor,
        scale: Tensor,
        keys: Tensor,
        source: Tensor,
        padding_mask: Tensor,
        first_hidden: Tensor,
        first_cell: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_steps, batch, model_dim = x.shape
        width = len(bias) // 4

        def make(steps: int, size: int) -> Tensor:
            return x.new_empty((steps, batch, size))

        gates = make(num_steps, 4 * width)
        gates.copy_(bias)
        multiply_into(gates.flatten(0, 1), x.flatten(0, 1), weight_x.t(), accumulate=True)
        outputs, cells = make(num_steps + 1, model_dim), make(num_steps + 1, width)
        outputs[0], cells[0] = first_hidden, first_cell
        hidden = outputs[1:] if projection is None else make(num_steps, width)
        inputs, squashed = make(num_steps, 2 * model_dim), make(num_steps, model_dim)
        weights = make(num_steps, keys.shape[1])
        query, weight, right = right_operands(num_steps, weight_query, weight_recurrent, projection)
        attention = query, scale, keys, source, padding_mask
        made = cells, hidden, outputs, inputs, squashed, weights
        load().attentive_forward(gates, *attention, weight, right, *made)
        parameters = weight_x, weight_recurrent, projection, weight_query, scale
        ctx.save_for_backward(x, *parameters, keys, source, gates, *made)
        ctx.set_materialize_grads(False)
        return outputs[1:], weights, cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_above: Tensor | None,
        grad_weights: Tensor | None,
        grad_last_cell: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, weight_x, weight_recurrent, projection, weight_query, scale, *kept = ctx.saved_tensors
        keys, source, gates, cells, hidden, outputs, inputs, squashed, weights = kept
        grad_outputs, grad_gates, grad_contexts, grad_scaled, grad_queries, grad_scores = (
            x.new_empty(like.shape)
            for like in (outputs[1:], gates, squashed, squashed, squashed, weights)
        )
        grad_cell = x.new_empty(cells.shape[1:])
        for total, above in ((grad_outputs, grad_above), (grad_cell, grad_last_cell)):
            total.copy_(x.new_zeros(()) if above is None else above)
        grad_hidden = torch.zeros_like(outputs[0])
        load().attentive_backward(
            *(gates, cells, weight_query, scale, keys, source, weight_recurrent, projection),
            *(squashed, weights, None if grad_weights is None else grad_weights.contiguous()),
            *(grad_outputs, grad_cell, grad_gates),
            *(grad_contexts, grad_scaled, grad_queries, grad_scores, grad_hidden),
        )
        needs = ctx.needs_input_grad
        flat = grad_gates.flatten(0, 1)
        return (
            matmul(flat, weight_x).view_as(x) if needs[0] else None,
            weight_gradient(flat, x) if needs[1] else None,
            flat.sum(0) if needs[2] else None,
            weight_gradient(flat, inputs) if needs[3] else None,
            weight_gradient(grad_outputs, hidden) if needs[4] else None,
            weight_gradient(grad_queries, outputs[:-1]) if needs[5] else None,
            (grad_scaled * squashed).sum((0, 1)) if needs[6] else None,
            _over_steps(grad_scores, squashed * scale) if needs[7] else None,
            _over_steps(weights, grad_contexts) if needs[8] else None,
            None,
            grad_hidden if needs[10] else None,
            grad_cell if needs[11] else None,
        )


def _over_steps(left: Tensor, right: Tensor) -> Tensor:
    """Sum left^T @ right over all steps for each sentence: (T, B, S), (T, B, D) -> (B, S, D)."""
    return torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1))
