"""Compute one LSTM step in inference, with packed weights, and with cells and states in float32."""

import torch
from torch import Tensor

from nmt_moe.kernels._cpu import has_compiled_loops, load
from nmt_moe.kernels.quantised import PackedLinear


def lstm_step(
    gates: Tensor, cell: Tensor, projection: PackedLinear | None = None
) -> tuple[Tensor, Tensor]:
    """Compute a step's output and cells from its gates.

    Args:
        gates: (B, 4 H), the gates before activation, in torch's order i, f, g, o; overwritten.
        cell: (B, H), the cells of the previous step.
        projection: (D, H); None if outputs are not projected.

    Returns:
        (B, D) output, and (B, H) cells.

    Source: Sak et al. 2014 (without peepholes).
    """
    if has_compiled_loops(gates, cell) and gates.is_contiguous():
        before, cell, hidden = cell.contiguous(), *cell.new_empty(2, *cell.shape).unbind(0)
        load().lstm_step(gates, before, cell, hidden)
    else:
        i, f, g, o = gates.chunk(4, dim=1)
        cell = torch.addcmul(f.sigmoid_() * cell, i.sigmoid_(), g.tanh_())
        hidden = torch.tanh(cell).mul_(o.sigmoid_())
    return hidden if projection is None else projection(hidden), cell
