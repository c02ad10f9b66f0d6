"""LSTM cells of packed weights in inference; cells and states stay in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nmt_moe.kernels.quantised import PackedLinear


def lstm_step(
    gates: Tensor, cell: Tensor, projection: PackedLinear | None = None
) -> tuple[Tensor, Tensor]:
    """Do what follows the product of a cell's gates.

    Args:
        gates: (B, 4 H), sums before their activations, in torch's order i, f, g, o; overwritten.
        cell: (B, H), of the step before.
        projection: (D, H); None where outputs are not projected.

    Returns:
        (B, D) output, and (B, H) cell.

    Source: Sak et al. 2014 (without peepholes).
    """
    i, f, g, o = gates.chunk(4, dim=1)
    cell = torch.addcmul(f.sigmoid_() * cell, i.sigmoid_(), g.tanh_())
    hidden = torch.tanh(cell).mul_(o.sigmoid_())
    return hidden if projection is None else projection(hidden), cell


def lstm_sequence(
    gates_of_x: Tensor,
    recurrent: PackedLinear,
    projection: PackedLinear | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM over all steps of a sequence, whose input products have been made at once.

    Args:
        gates_of_x: (T, B, 4 H), inputs times their weights, plus both biases; overwritten.
        recurrent: (4 H, D).
        projection: (D, H); None where D is H.
        hidden: (B, D) output of the step before; zeros when None.
        cell: (B, H) cell of the step before; zeros when None.

    Returns:
        (T, B, D) outputs; output and cell after the last step.
    """
    batch, width = gates_of_x.shape[1:]
    if cell is None:
        cell = gates_of_x.new_zeros(batch, width // 4)
    outputs = []
    for gates in gates_of_x.unbind(0):
        if hidden is not None:  # else the product is zero
            gates = recurrent(hidden, gates)
        hidden, cell = lstm_step(gates, cell, projection)
        outputs.append(hidden)
    if hidden is None:
        hidden = gates_of_x.new_zeros(batch, recurrent.shape[1])
    return _stack(outputs, hidden), hidden, cell


def _stack(outputs: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(outputs)) if outputs else like.new_empty(0, *like.shape)
