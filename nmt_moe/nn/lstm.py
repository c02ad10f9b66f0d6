"""LSTMs with a recurrent projection; the first dimension of their inputs is time."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmt_moe.kernels import has_compiled_loops, lstm

State = tuple[Tensor, Tensor]

# Users can ignore this warning, because the implementation that it announces is the faster one for
# these sizes.
warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")


@dataclass(frozen=True)
class LSTMState:
    """The state of all LSTMs in a decoder or language model between two steps.

    Attributes:
        hidden: (B, layers, D), the LSTMs' outputs.
        cell: (B, layers, H), the LSTMs' cells.
    """

    hidden: Tensor
    cell: Tensor

    def reorder(self, new_order: Tensor) -> "LSTMState":
        """Select rows; `new_order`, (B',) int64, contains the old row of each new row."""
        return LSTMState(
            self.hidden.index_select(0, new_order), self.cell.index_select(0, new_order)
        )


class ProjectedLSTM(nn.Module):
    """An LSTM layer with a recurrent projection.

    Source: Sak et al. 2014 (without peepholes).
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        projection = output_dim if output_dim != hidden_dim else 0
        self.lstm = nn.LSTM(input_dim, hidden_dim, proj_size=projection)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run the LSTM over all steps.

        Args:
            x: (T, B, input_dim), the inputs.
            state: Output (B, output_dim) and cells (B, hidden_dim) of the previous step; None for
                zeros.

        Returns:
            (T, B, output_dim) outputs, and the state after the last step.
        """
        weights: Any = self.lstm
        weight_hr = weights.weight_hr_l0 if weights.proj_size else None
        tensors = weights.weight_ih_l0, weights.weight_hh_l0, weights.bias_ih_l0, weight_hr
        if x.numel() > 0 and has_compiled_loops(x, *tensors, *(state or ())):
            bias = weights.bias_ih_l0 + weights.bias_hh_l0
            out, cell = lstm(x, *tensors[:2], bias, weight_hr, state)
            return out, (out[-1], cell)
        lifted = None if state is None else (state[0].unsqueeze(0), state[1].unsqueeze(0))
        out, (hidden, cells) = self.lstm(x, lifted)
        return out, (hidden[0], cells[0])


class BidirectionalLSTM(nn.Module):
    """Two LSTMs, one in each direction, with their outputs summed.

    Source: Shazeer et al. 2017, Appendix E; Wu et al. 2016, section 3.2.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.forwards = ProjectedLSTM(input_dim, hidden_dim, output_dim)
        self.backwards = ProjectedLSTM(input_dim, hidden_dim, output_dim)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Run the LSTMs in both directions.

        Args:
            x: (S, B, input_dim), padded at the end.
            lengths: (B,) int64, the number of tokens in each sentence.

        Returns:
            (S, B, output_dim) outputs. The values at padded positions are undefined.
        """
        turn = turned_positions(lengths, len(x)).unsqueeze(2)
        backwards, _ = self.backwards(torch.take_along_dim(x, turn, dim=0))
        return self.forwards(x)[0] + torch.take_along_dim(backwards, turn, dim=0)


def turned_positions(lengths: Tensor, num_positions: int) -> Tensor:
    """Return indices that reverse each sentence but not its padding. They are their own inverse.

    Args:
        lengths: (B,) int64, the number of tokens in each sentence.
        num_positions: Number of positions, S.

    Returns:
        (S, B) int64, the position to take each token from.
    """
    position = torch.arange(num_positions, device=lengths.device).unsqueeze(1)
    return torch.where(position < lengths, lengths - 1 - position, position)
