"""Run a bundle's encoder and decoder, or its language model, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from nmt_moe.inference.layers import (
    Attention,
    BidirectionalLSTM,
    DeepExpert,
    EmbeddedLSTM,
    Memory,
    MoE,
    State,
    Trace,
    make_attentive_lstm,
    make_lstm,
)
from nmt_moe.inference.weights import Weights
from nmt_moe.kernels import log_probabilities, tanh
from nmt_moe.nn import GNMTConfig, LSTMLMConfig
from nmt_moe.nn.lstm import turned_positions

# Once this share of the sentences is finished, the finished ones are dropped from the encoder's
# outputs, which requires copying the outputs of the others.
DROPPED_AT = 0.3


@dataclass(frozen=True)
class DecoderState:
    """The decoder's state for R rows; the rows of a sentence are consecutive.

    Attributes:
        memory: The sentences, in the order of the rows.
        sentence: (R,) int64, the index of each row's sentence in `memory`.
        layers: The state of each LSTM layer, for P rows.
        parents: (R,) int64, the row of `layers` that each row continues; None if P = R, and row r
            continues row r. If several rows continue a state, its products are computed only once.
    """

    memory: Memory
    sentence: Tensor
    layers: list[State]
    parents: Tensor | None = None

    def reorder(self, rows: Tensor) -> Self:
        """Return the state of new rows; `rows`, (R',) int64, contains the old row of each."""
        sentence, memory = self.sentence[rows], self.memory
        parents = rows if self.parents is None else self.parents[rows]
        if rows.numel() < self.sentence.numel():  # otherwise, hardly any sentences have finished
            live, inverse = sentence.unique_consecutive(return_inverse=True)
            if live.numel() <= (1 - DROPPED_AT) * memory.source.shape[0]:
                memory, sentence = memory.pick(live), inverse
        return type(self)(memory, sentence, self.layers, parents)


class TranslationNetwork:
    """A GNMT-style encoder and decoder with the softmax layer.

    Source: Shazeer et al. 2017, Appendix E; `nmt_moe.nn.GNMTEncoder`, `GNMTDecoder`.
    """

    def __init__(self, folder: Path, weights: Weights) -> None:
        config = weights.config.network
        assert isinstance(config, GNMTConfig)
        moe, dtype = config.moe, weights.config.dtype
        self.source_embedding = weights.embedding("encoder.embedding.weight")
        self.encoder_bottom = BidirectionalLSTM(weights, "encoder.bottom", self.source_embedding)
        self.encoder_moe = None if moe is None else MoE(weights, folder, "encoder", moe, dtype)
        numbers = range(config.encoder_layers - 2)
        self.encoder_layers = [make_lstm(weights, f"encoder.layers.{number}") for number in numbers]
        self.attention_keys = weights.linear("encoder.attention_keys.projection.weight")
        self.is_product = config.attention == "product"

        self.target_embedding = weights.embedding("decoder.embedding.weight")
        self.is_recurrent = config.attention_wiring == "recurrent"
        attention = "decoder.bottom.attention" if self.is_recurrent else "decoder.attention"
        self.attention = Attention(weights, attention, config.attention)
        make = make_attentive_lstm if self.is_recurrent else make_lstm
        self.decoder_bottom = EmbeddedLSTM(make(weights, "decoder.bottom"), self.target_embedding)
        moe = config.decoder_moe
        self.decoder_moe = None if moe is None else MoE(weights, folder, "decoder", moe, dtype)
        numbers = range(config.decoder_layers - 1)
        self.decoder_layers = [make_lstm(weights, f"decoder.layers.{number}") for number in numbers]
        self.output = weights.linear("decoder.output.weight")

    def encode(self, sentences: list[list[int]], pad: int, trace: Trace | None = None) -> Memory:
        """Encode B sentences of at least one token.

        Args:
            sentences: Token ids of each sentence.
            pad: Token that pads shorter sentences; the network never reads it.
            trace: Object that receives the experts of all tokens, one sentence after another.
        """
        order = sorted(range(len(sentences)), key=lambda number: -len(sentences[number]))
        lengths = [len(sentences[number]) for number in order]
        steps = lengths[0]
        tokens = torch.tensor([sentences[n] + [pad] * (steps - len(sentences[n])) for n in order])
        is_token = torch.arange(steps).unsqueeze(1) < torch.tensor(lengths)  # (S, B)
        by_step = tokens.t().contiguous()
        x = self.source_embedding(by_step)
        turn = turned_positions(torch.tensor(lengths), steps)
        x = x + self.encoder_bottom.run(x, by_step, lengths, turn)
        if self.encoder_moe is not None:
            is_full = lengths[-1] == steps
            flat = x.flatten(0, 1) if is_full else x[is_token]
            y = self.encoder_moe(flat, trace)
            x = y.view_as(x) if is_full else torch.zeros_like(x).index_put_((is_token,), y)
            if trace is not None:
                _sort_trace(trace, is_token, order)
        for layer in self.encoder_layers:
            x = x + layer.run(x, lengths)
        x = x * is_token.unsqueeze(2)
        source = x.transpose(0, 1)[torch.tensor(order).argsort()].contiguous()
        keys = self.attention_keys(source)
        padding = ~is_token.t()[torch.tensor(order).argsort()].contiguous()
        return Memory(source, tanh(keys) if self.is_product else keys, padding)

    def start(self, memory: Memory) -> DecoderState:
        """Return the initial state, with one row for each sentence."""
        num_rows = memory.source.shape[0]
        layers = [self.decoder_bottom.lstm, *self.decoder_layers]
        states = [layer.start(num_rows) for layer in layers]
        return DecoderState(memory, torch.arange(num_rows), states)

    def step(
        self, tokens: Tensor, state: DecoderState, trace: Trace | None = None
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Predict the next token; this is the `step` of `beam_search`.

        Args:
            tokens: (R, T) int64; only the last token of each row is read.
            state: The state after the previous tokens.
            trace: Object that receives the experts of the last tokens.

        Returns:
            (R, V) log-probabilities, (R, S) attention, and the state.
        """
        layers, parents = list(state.layers), state.parents
        last = tokens[:, -1]
        x = self.target_embedding(last)
        output, cell = layers[0]
        if self.is_recurrent:
            if parents is not None:
                output, cell = output[parents], cell[parents]
            context, attention = self.attention(output, state.memory, state.sentence)
            wide = torch.cat([context, output], dim=1)
            layers[0] = self.decoder_bottom.step(x, last, wide, cell)
        else:
            layers[0] = self.decoder_bottom.step(x, last, output, cell, parents)
            context, attention = self.attention(layers[0][0], state.memory, state.sentence)
        x = x + layers[0][0]
        if self.decoder_moe is not None:
            x = self.decoder_moe(x, trace)
        for number, layer in enumerate(self.decoder_layers, start=1):
            takes_context = number == 1 and not self.is_recurrent
            wide = torch.cat([x, context], dim=1) if takes_context else x
            layers[number] = layer.step(wide, *layers[number], parents)
            x = x + layers[number][0]
        log_probs = log_probabilities(self.output, x)
        return log_probs, attention, DecoderState(state.memory, state.sentence, layers)


def _sort_trace(trace: Trace, is_token: Tensor, order: list[int]) -> None:
    """Sort the last call's tokens by sentence. They were traced step by step."""
    number = torch.zeros(is_token.shape, dtype=torch.int64)
    number[is_token] = torch.arange(int(is_token.sum()))
    columns = torch.tensor(order).argsort()
    by_sentence = number.t()[columns][is_token.t()[columns]]
    for values in (trace.expert_ids, trace.gates, trace.inputs):
        if values:
            values[-1] = values[-1][by_sentence]


class LanguageNetwork:
    """The language model with its softmax layer.

    Source: Shazeer et al. 2017, Appendix C.1; `nmt_moe.nn.LSTMLanguageModel`.
    """

    def __init__(self, folder: Path, weights: Weights) -> None:
        config = weights.config.network
        assert isinstance(config, LSTMLMConfig)
        self.embedding = weights.embedding("decoder.embedding.weight")
        self.layers = [make_lstm(weights, f"decoder.layers.{n}") for n in range(config.lstm_layers)]
        self.moe: MoE | DeepExpert | None = None
        if config.moe is not None and config.expert_layers > 1:
            self.moe = DeepExpert(weights, "decoder", config.expert_layers)
        elif config.moe is not None:
            self.moe = MoE(weights, folder, "decoder", config.moe, weights.config.dtype)
        self.output = weights.linear("decoder.output.weight")
        # There are fewer outputs than symbols if the rarest words are read but never predicted.
        self.num_outputs = len(weights["decoder.output.weight"])

    def start(self, num_rows: int) -> list[State]:
        """Return the state of all layers before the first token."""
        return [layer.start(num_rows) for layer in self.layers]

    def step(
        self, tokens: Tensor, states: list[State], trace: Trace | None = None
    ) -> tuple[Tensor, list[State]]:
        """Map (R,) int64 tokens and states to the next (R, V) log-probabilities and new states."""
        x, new_states = self.embedding(tokens), []
        for index, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            if index == 1 and self.moe is not None:
                x = self.moe(x, trace)
            new_states.append(layer.step(x, *state))
            x = x + new_states[-1][0]
        return log_probabilities(self.output, x), new_states

    def score(
        self, tokens: Tensor, lengths: list[int], targets: Tensor, trace: Trace | None = None
    ) -> Tensor:
        """Return the log-probability of each target.

        Args:
            tokens: (T, B) int64, the tokens to read.
            lengths: Length of each row, in descending order.
            targets: (T, B) int64, the tokens that follow.
            trace: Object that receives the experts of the tokens.

        Returns:
            (T, B) float32, in nats; 0 at padding.
        """
        is_token = torch.arange(len(tokens)).unsqueeze(1) < torch.tensor(lengths)
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            if index == 1 and self.moe is not None:
                x = torch.zeros_like(x).index_put_((is_token,), self.moe(x[is_token], trace))
            x = x + layer.run(x, lengths)
        log_probs = log_probabilities(self.output, x[is_token])
        chosen = log_probs.gather(1, targets[is_token].unsqueeze(1)).squeeze(1)
        return torch.zeros(tokens.shape).index_put_((is_token,), chosen)
