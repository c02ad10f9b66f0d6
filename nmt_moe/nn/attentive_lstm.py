"""The decoder's first LSTM in the paper's wiring: it attends, and takes in what it attended to."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.nn.attention import Attention
from nmt_moe.nn.encoder import EncoderOutput
from nmt_moe.nn.lstm import State


class AttentiveLSTM(nn.Module):
    """An LSTM with projection whose input at each step is [x; context].

    The context of a step is what the output of the step before attends to (at the first step the
    zero output, hence all positions equally), as in GNMT. Steps cannot run at once.

    Source: Shazeer et al. 2017, Appendix E; Wu et al. 2016, section 3.
    """

    def __init__(self, model_dim: int, hidden_dim: int, attention: str) -> None:
        super().__init__()
        self.attention = Attention(model_dim, attention)
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_dim, 2 * model_dim))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_dim, model_dim))
        self.bias_ih = nn.Parameter(torch.zeros(4 * hidden_dim))
        self.projection = nn.Linear(hidden_dim, model_dim, bias=False)

    def forward(
        self, x: Tensor, encoder_out: EncoderOutput, state: State | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Run over all steps.

        Args:
            x: (T, B, D).
            encoder_out: Of the same B sentences.
            state: Output (B, D) and cells (B, H) of the step before; zeros when None.

        Returns:
            (T, B, D) outputs, (B, T, S) attention weights, and the state after the last step.
        """
        if state is None:
            hidden_dim = self.projection.in_features
            state = torch.zeros_like(x[0]), x.new_zeros(x.shape[1], hidden_dim)
        hidden, cell = state
        weight_x, weight_context = self.weight_ih.split(x.shape[2], dim=1)
        weight_recurrent = torch.cat([weight_context, self.weight_hh], dim=1)
        gates_of_x = F.linear(x, weight_x, self.bias_ih)  # (T, B, 4 H)
        outputs, rows = [], []
        for gates_t in gates_of_x.unbind(0):
            context, weights = self.attention(
                hidden.unsqueeze(1), encoder_out.keys, encoder_out.source, encoder_out.padding_mask
            )
            recurrent = torch.cat([context.squeeze(1), hidden], dim=1)
            gates = gates_t + F.linear(recurrent, weight_recurrent)
            i, f, g, o = gates.chunk(4, dim=1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = self.projection(torch.sigmoid(o) * torch.tanh(cell))
            outputs.append(hidden)
            rows.append(weights)
        return torch.stack(outputs), torch.cat(rows, dim=1), (hidden, cell)
