"""The layers of the networks, with a bundle's weights and without gradients, dropout or statistics.

Each layer computes the same output as its namesake in `nmt_moe.nn` in evaluation mode. Tests
compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.inference.weights import Embedding, ExpertWeights, Weights
from nmt_moe.kernels import (
    PackedLinear,
    PackedLSTM,
    attend_rows,
    choose_experts,
    packed_mixture_ffn,
    sigmoid_residual,
)
from nmt_moe.moe import MoEConfig, NoisyTopKGate, build_gate

State = tuple[Tensor, Tensor]
# Maximum number of elements in a table of an LSTM's products with embeddings, which takes 64 MiB.
TABLE_BELOW = 1 << 24
# With fewer tokens, reading the weights costs no more than reading the table.
TABLE_FROM = 64


@dataclass(frozen=True)
class Memory:
    """The encodings of B sentences that the decoder needs.

    Attributes:
        source: (B, S, D), the encoder's outputs; 0 at padding.
        keys: (B, S, D), the part of attention that depends only on the source.
        padding: (B, S) bool, True for padding.
    """

    source: Tensor
    keys: Tensor
    padding: Tensor

    def pick(self, sentences: Tensor) -> Memory:
        """Return the memory of selected sentences, given their indices (B',) int64."""
        return Memory(self.source[sentences], self.keys[sentences], self.padding[sentences])


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


def make_lstm(weights: Weights, name: str) -> PackedLSTM:
    """Return an LSTM of a bundle, with a projection if there are weights for one."""
    part = f"{name}.lstm."
    bias = weights[f"{part}bias_ih_l0"] + weights[f"{part}bias_hh_l0"]
    projection = f"{part}weight_hr_l0"
    return PackedLSTM(
        weights.linear(f"{part}weight_ih_l0", bias),
        weights.linear(f"{part}weight_hh_l0"),
        weights.linear(projection) if projection in weights else None,
    )


def make_attentive_lstm(weights: Weights, name: str) -> PackedLSTM:
    """Return an LSTM of `nmt_moe.nn.attentive_lstm`.

    Each step reads the context and the previous output, (R, 2 D), instead of only the output.
    """
    projection = f"{name}.projection.weight"
    return PackedLSTM(
        weights.linear(f"{name}.weight_x", weights[f"{name}.bias_ih"]),
        weights.linear(f"{name}.weight_recurrent"),
        weights.linear(projection) if projection in weights else None,
    )


class EmbeddedLSTM:
    """An LSTM whose inputs are embeddings.

    The products of all embeddings and the LSTM's weights are kept in a table, unless it would be
    too large. Results are the same with and without the table.
    """

    def __init__(self, lstm: PackedLSTM, embedding: Embedding) -> None:
        self.lstm, self.embedding = lstm, embedding
        self._table: Tensor | None = None
        self._fits = len(embedding) * lstm.of_input.shape[0] <= TABLE_BELOW

    def step(
        self,
        x: Tensor,
        tokens: Tensor,
        output: Tensor,
        cell: Tensor,
        parents: Tensor | None = None,
    ) -> State:
        """Run one step as `PackedLSTM.step` does, given embeddings (R, D) and their tokens (R,)."""
        table = self._table_for(tokens)
        if table is None:
            return self.lstm.step(x, output, cell, parents)
        return self.lstm.step_tokens(table, tokens, output, cell, parents)

    def run(self, x: Tensor, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Run over sentences as `PackedLSTM.run` does.

        `x` contains the embeddings (S, B, D) of the tokens (S, B).
        """
        table = self._table_for(tokens)
        if table is None:
            return self.lstm.run(x, lengths)
        return self.lstm.run_gates(table[tokens], lengths)

    def _table_for(self, tokens: Tensor) -> Tensor | None:
        """Return the table (V, 4 H) if it is worth reading, or None."""
        if not self._fits or tokens.numel() < TABLE_FROM:
            return None
        if self._table is None:
            self._table = self.lstm.of_input(self.embedding(torch.arange(len(self.embedding))))
        return self._table


class BidirectionalLSTM:
    """Two LSTMs that read from opposite ends of the sentence, with their outputs summed."""

    def __init__(self, weights: Weights, name: str, embedding: Embedding) -> None:
        self.forwards = EmbeddedLSTM(make_lstm(weights, f"{name}.forwards"), embedding)
        self.backwards = EmbeddedLSTM(make_lstm(weights, f"{name}.backwards"), embedding)

    def run(self, x: Tensor, tokens: Tensor, lengths: list[int], turn: Tensor) -> Tensor:
        """Run over whole sentences, with the same arguments as `EmbeddedLSTM.run`.

        `turn` is (S, B) int64, from `turned_positions`.
        """
        index = turn.unsqueeze(2)
        turned = torch.take_along_dim(x, index, dim=0), torch.take_along_dim(tokens, turn, dim=0)
        backwards = self.backwards.run(*turned, lengths)
        return self.forwards.run(x, tokens, lengths) + torch.take_along_dim(backwards, index, dim=0)


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
        self.gate_logits: PackedLinear | None = None
        if isinstance(self.gate, NoisyTopKGate):
            self.gate_logits = PackedLinear.pack(self.gate.gate_weight.t())
        self.experts = ExpertWeights(folder, side, config, dtype)

    def __call__(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """Compute the layer's output (N, D) for inputs (N, D)."""
        gates, expert_ids = self._choose(x)
        if trace is not None:
            trace.expert_ids.append(expert_ids)
            trace.gates.append(gates)
            if trace.inputs is not None:
                trace.inputs.append(x)
        weights = self.experts.weight_in, self.experts.weight_out
        y = packed_mixture_ffn(x, gates, expert_ids, *weights)
        return sigmoid_residual(y, x)

    def expert_outputs(self, x: Tensor, expert_ids: Sequence[int]) -> Tensor:
        """Compute the outputs of given experts for all tokens, regardless of the gate's choice.

        Args:
            x: (N, D), inputs to the layer: `Routing.inputs`.
            expert_ids: Ids of E' experts.

        Returns:
            (E', N, D) float32, before the sum over experts and the sigmoid.
        """
        into, out = self.experts.weight_in, self.experts.weight_out
        return torch.stack([out[e](into[e](x).relu_()) for e in expert_ids])

    def _choose(self, x: Tensor) -> State:
        """Return (N, K) gates and experts."""
        # The training gate also computes statistics, which takes longer than choosing the experts.
        if self.gate_logits is not None:
            return choose_experts(self.gate_logits(x), self.config.top_k)
        gating = self.gate(x)
        return gating.gates, gating.expert_ids


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
        return sigmoid_residual(last(y), x)


class Attention:
    """Both forms of attention, for the queries of one step.

    Source: Shazeer et al. 2017, Appendix G.
    """

    def __init__(self, weights: Weights, name: str, kind: str) -> None:
        self.projection = weights.linear(f"{name}.projection.weight")
        self.scale = weights[f"{name}.scale"]
        self.is_product = kind == "product"

    def __call__(self, query: Tensor, memory: Memory, sentence: Tensor) -> State:
        """Compute the context and the attention weights of each row.

        Args:
            query: (R, D), decoder outputs that attend.
            memory: The encodings of B sentences.
            sentence: (R,) int64, the sentence of each row, in ascending order.

        Returns:
            (R, D) context and (R, S) weights.
        """
        return attend_rows(
            self.projection(query),
            self.scale,
            memory.keys,
            memory.source,
            memory.padding,
            sentence,
            self.is_product,
        )
