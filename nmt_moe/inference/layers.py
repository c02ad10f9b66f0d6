"""The layers of the networks, with a bundle's weights and without gradients, dropout or statistics.

Each layer computes the same output as its namesake in `nmt_moe.nn` in evaluation. Tests compare
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.inference.weights import ExpertWeights, Weights
from nmt_moe.kernels import lstm_step, packed_mixture_ffn
from nmt_moe.moe import MoEConfig, NoisyTopKGate, build_gate

State = tuple[Tensor, Tensor]

# Up to this many gate logits are fully sorted, which is the fastest way to find the largest ones.
FEW_LOGITS = 1 << 14
# The maximum number of rows in a step when a single sentence is searched.
FEW_ROWS = 8


@dataclass
class Trace:
    """The experts that tokens were sent to, in the order of the calls.

    Attributes:
        expert_ids: (N, K) int64 for each call; E in empty slots.
        gates: (N, K) float32 for each call.
        inputs: (N, D) float32 for each call, the layer's inputs; None to keep none.
    """

    expert_ids: list[Tensor]
    gates: list[Tensor]
    inputs: list[Tensor] | None = None


class LSTM:
    """An LSTM, with a projection if it has weights for one.

    Source: Sak et al. 2014 (without peepholes).
    """

    def __init__(self, weights: Weights, name: str) -> None:
        part = f"{name}.lstm."
        bias = weights[f"{part}bias_ih_l0"] + weights[f"{part}bias_hh_l0"]
        self.of_input = weights.linear(f"{part}weight_ih_l0", bias)
        self.of_hidden = weights.linear(f"{part}weight_hh_l0")
        projection = f"{part}weight_hr_l0"
        self.projection = weights.linear(projection) if projection in weights else None
        self.cell_dim = len(bias) // 4
        self.output_dim = weights[f"{part}weight_hh_l0"].shape[1]

    def start(self, num_rows: int) -> State:
        """Return the state before the first step."""
        return torch.zeros(num_rows, self.output_dim), torch.zeros(num_rows, self.cell_dim)

    def step(self, x: Tensor, state: State) -> State:
        """Run one step: map (R, I) inputs and a state to the new state (output, cell)."""
        return self._update(self.of_input(x), state)

    def run(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Run over whole sentences.

        Args:
            x: (S, B, I) inputs.
            lengths: Length of each sentence, in descending order.

        Returns:
            (S, B, O); 0 at padded positions.
        """
        gates = self.of_input(x)
        outputs = x.new_zeros(*x.shape[:2], self.output_dim)
        hidden, cell = self.start(x.shape[1])
        num_rows = x.shape[1]
        for step, gates_t in enumerate(gates.unbind(0)):
            while lengths[num_rows - 1] <= step:
                num_rows -= 1
            state = hidden[:num_rows], cell[:num_rows]
            hidden, cell = self._update(gates_t[:num_rows], state)
            outputs[step, :num_rows] = hidden
        return outputs

    def _update(self, gates: Tensor, state: State) -> State:
        return lstm_step(self.of_hidden(state[0], gates), state[1], self.projection)


class BidirectionalLSTM:
    """Two LSTMs that read from opposite ends of the sentence, with their outputs summed."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.forwards = LSTM(weights, f"{name}.forwards")
        self.backwards = LSTM(weights, f"{name}.backwards")

    def run(self, x: Tensor, lengths: list[int], turn: Tensor) -> Tensor:
        """Run over whole sentences, with the same arguments as `LSTM.run`.

        `turn` is (S, B) int64, from `turned_positions`.
        """
        index = turn.unsqueeze(2)
        backwards = self.backwards.run(torch.take_along_dim(x, index, dim=0), lengths)
        return self.forwards.run(x, lengths) + torch.take_along_dim(backwards, index, dim=0)


class MoE:
    """An MoE layer with its sigmoid and residual.

    Source: Shazeer et al. 2017, eq. 1, Appendices C.1 and E.
    """

    def __init__(
        self, weights: Weights, folder: Path, side: str, config: MoEConfig, dtype: str
    ) -> None:
        self.config = config
        self.gate = build_gate(config).eval().requires_grad_(False)
        prefix = f"{side}.moe.moe.gate."
        state = self.gate.state_dict()
        names = [name for name in state if f"{prefix}{name}" in weights]
        self.gate.load_state_dict(
            {name: weights[prefix + name] for name in names}, strict=False, assign=True
        )
        self.experts = ExpertWeights(folder, side, config, dtype)

    def __call__(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """Compute the layer's output (N, D) for inputs (N, D)."""
        gates, expert_ids = self._choose(x)
        if trace is not None:
            trace.expert_ids.append(expert_ids)
            trace.gates.append(gates)
            if trace.inputs is not None:
                trace.inputs.append(x)
        experts, are_few = self.experts, x.shape[0] <= FEW_ROWS
        if are_few and experts.is_small and expert_ids.numel() >= experts.num_experts:
            y = self._mix_all(x, gates, expert_ids)
        else:
            y = packed_mixture_ffn(x, gates, expert_ids, experts.weight_in, experts.weight_out)
        return y.sigmoid_().add_(x)

    def expert_outputs(self, x: Tensor, expert_ids: Sequence[int]) -> Tensor:
        """Compute the outputs of given experts for all tokens, regardless of the gate's choice.

        Args:
            x: (N, D), inputs of the layer: `Routing.inputs`.
            expert_ids: Ids of E' experts.

        Returns:
            (E', N, D) float32, before the sum over experts and the sigmoid.
        """
        into, out = self.experts.weight_in, self.experts.weight_out
        return torch.stack([out[e](into[e](x).relu_()) for e in expert_ids])

    def _mix_all(self, x: Tensor, gates: Tensor, expert_ids: Tensor) -> Tensor:
        """Send a few tokens to all experts in one call, because they need most experts anyway."""
        into, out = self.experts.joined
        all_gates = x.new_zeros(x.shape[0], self.experts.num_experts + 1)
        all_gates.scatter_(1, expert_ids, gates)
        hidden = into(x).relu_().view(x.shape[0], self.experts.num_experts, -1)
        hidden.mul_(all_gates[:, :-1].unsqueeze(2))
        return out(hidden.flatten(1))

    def _choose(self, x: Tensor) -> State:
        """Return (N, K) gates and experts."""
        num_logits = x.shape[0] * self.config.num_experts
        if not isinstance(self.gate, NoisyTopKGate) or num_logits > FEW_LOGITS:
            gating = self.gate(x)
            return gating.gates, gating.expert_ids
        # The training gate also computes statistics, which takes longer than choosing the experts.
        logits = x @ self.gate.gate_weight
        values, ids = logits.sort(dim=1, descending=True, stable=True)  # ties: lowest id first
        top_k = self.config.top_k
        return values[:, :top_k].softmax(dim=1), ids[:, :top_k]


class DeepExpert:
    """A single expert with several hidden layers, used instead of an MoE layer.

    Source: Shazeer et al. 2017, Appendix C.1 (MoE-1-Deep).
    """

    def __init__(self, weights: Weights, side: str, num_layers: int) -> None:
        names = [f"{side}.moe.products.{layer}.weight" for layer in range(num_layers + 1)]
        self.products = [weights.linear(name) for name in names]

    def __call__(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """Compute the layer's output (N, D) for inputs (N, D)."""
        *inner, last = self.products
        y = x
        for product in inner:
            y = F.relu(product(y))
        return x + last(y).sigmoid_()


class Attention:
    """Both forms of attention, for the queries of one step.

    Source: Shazeer et al. 2017, Appendix G.
    """

    def __init__(self, weights: Weights, name: str, kind: str) -> None:
        self.projection = weights.linear(f"{name}.projection.weight")
        self.scale = weights[f"{name}.scale"]
        self.is_product = kind == "product"

    def __call__(self, query: Tensor, keys: Tensor, source: Tensor, bias: Tensor) -> State:
        """Compute the context and the attention weights of each query.

        Args:
            query: (B, W, D), the decoder outputs that attend.
            keys: (B, S, D), the part of attention that depends only on the source.
            source: (B, S, D), the encoder's outputs.
            bias: (B, 1, S), 0, or -inf for padding.

        Returns:
            (B, W, D) context and (B, W, S) weights.
        """
        projected = self.projection(query)
        if self.is_product:
            scores = torch.baddbmm(bias, projected.tanh_().mul_(self.scale), keys.transpose(1, 2))
        else:
            scores = torch.tanh(projected.unsqueeze(2) + keys.unsqueeze(1)) @ self.scale + bias
        weights = scores.softmax(dim=2)
        return torch.bmm(weights, source), weights
