"""The decoder's first LSTM in the paper's wiring, with the attention's context as an input."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nmt_moe.kernels import attentive_lstm, has_compiled_loops
from nmt_moe.nn.attention import ATTENTIONS, ProductAttention
from nmt_moe.nn.encoder import EncoderOutput
from nmt_moe.nn.linear import Linear
from nmt_moe.nn.lstm import State


class AttentiveLSTM(nn.Module):
    """An LSTM with the input [x; context] at each step, and with a projection if D and H differ.

    As in GNMT, the output of the previous step is the query for a step's context. At the first
    step, the query is zero, so all positions get equal weights. Steps cannot run in parallel.

    Source: Shazeer et al. 2017, Appendix E; Wu et al. 2016, section 3.
    """

    def __init__(self, model_dim: int, hidden_dim: int, attention: str) -> None:
        super().__init__()
        self.attention = ATTENTIONS[attention](model_dim)
        self.weight_x = nn.Parameter(torch.empty(4 * hidden_dim, model_dim))
        # The first D columns multiply the context, and the others the previous output.
        self.weight_recurrent = nn.Parameter(torch.empty(4 * hidden_dim, 2 * model_dim))
        self.bias_ih = nn.Parameter(torch.zeros(4 * hidden_dim))
        self.hidden_dim = hidden_dim
        is_projected = hidden_dim != model_dim
        self.projection = Linear(hidden_dim, model_dim) if is_projected else nn.Identity()

    def forward(
        self, x: Tensor, encoder_out: EncoderOutput, state: State | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Run the LSTM over all steps.

        Args:
            x: (T, B, D), the inputs.
            encoder_out: The encoder's output for the same B sentences.
            state: Output (B, D) and cells (B, H) of the previous step; None for zeros.

        Returns:
            (T, B, D) outputs, (B, T, S) attention weights, and the state after the last step.
        """
        if state is None:
            state = torch.zeros_like(x[0]), x.new_zeros(x.shape[1], self.hidden_dim)
        hidden, cell = state
        if self._is_compiled(x, encoder_out, state):
            return self._run_compiled(x, encoder_out, state)
        gates_of_x = F.linear(x, self.weight_x, self.bias_ih)  # (T, B, 4 H)
        inputs: list[Tensor] = []
        gates_of_x = _CollectWeightGradient.apply(gates_of_x, self.weight_recurrent, inputs)
        weight_recurrent = self.weight_recurrent.detach().t()
        outputs, rows = [], []
        for gates_t in gates_of_x.unbind(0):
            context, weights = self.attention(
                hidden.unsqueeze(1), encoder_out.keys, encoder_out.source, encoder_out.padding_mask
            )
            recurrent = torch.cat([context.squeeze(1), hidden], dim=1)
            gates = torch.addmm(gates_t, recurrent, weight_recurrent)
            inputs.append(recurrent.detach())
            i, f, g, o = gates.chunk(4, dim=1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = self.projection(torch.sigmoid(o) * torch.tanh(cell))
            outputs.append(hidden)
            rows.append(weights)
        return torch.stack(outputs), torch.cat(rows, dim=1), (hidden, cell)

    def _is_compiled(self, x: Tensor, encoder_out: EncoderOutput, state: State) -> bool:
        """Return whether compiled loops can run all steps. None exist for additive attention."""
        tensors = x, self.weight_x, self.bias_ih, encoder_out.keys, encoder_out.source, *state
        is_product = isinstance(self.attention, ProductAttention)
        return is_product and x.numel() > 0 and has_compiled_loops(*tensors)

    def _run_compiled(
        self, x: Tensor, encoder_out: EncoderOutput, state: State
    ) -> tuple[Tensor, Tensor, State]:
        projection: Any = self.projection
        is_projected = isinstance(projection, nn.Linear)
        outputs, weights, cell = attentive_lstm(
            x,
            self.weight_x,
            self.bias_ih,
            self.weight_recurrent,
            projection.weight if is_projected else None,
            self.attention.projection.weight,
            self.attention.scale,
            encoder_out.keys,
            encoder_out.source,
            encoder_out.padding_mask,
            state,
        )
        return outputs, weights, (outputs[-1], cell)


class _CollectWeightGradient(torch.autograd.Function):
    """The gradient of the recurrent weights, computed as one product over all steps.

    Autograd would add up one product per step, each over only a few rows. The gates of all steps
    pass through this function before the recurrent part is added, so their gradients are all known
    when its backward pass runs. By then, the steps have filled `inputs`.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs = inputs
        return gates.view_as(gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gates: Tensor) -> tuple[Tensor, Tensor, None]:
        flat = grad_gates.reshape(-1, grad_gates.shape[2])
        return grad_gates, flat.t() @ torch.cat(ctx.inputs), None
