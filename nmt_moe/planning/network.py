"""Describe a network: its parameters, matrix products and activations.

Modules are built and run on the meta device, where tensors have shapes but no values, so that a
model with 137 billion parameters takes no memory. torch reports every matrix product, and every
tensor that the forward pass saves for the backward pass. A new layer that consists of torch's
operations therefore needs no new code in this module. Only the MoE layer is described by formulas,
in `mixture`, because its fused operations depend on the values of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.moe import MoELayer
from nmt_moe.nn import GNMTConfig, GNMTDecoder, GNMTEncoder, LSTMLanguageModel, LSTMLMConfig
from nmt_moe.planning.architectures import NetworkConfig
from nmt_moe.planning.batch import Batch
from nmt_moe.planning.mixture import gate_products, rows_per_token
from nmt_moe.planning.recorder import Network, Product, Recorder, is_matrix


@dataclass(frozen=True)
class Totals:
    """Totals of a batch's forward pass.

    Attributes:
        macs: Number of multiply-adds, by part of the network.
        kept: Bytes kept for the backward pass, by part of the network.
    """

    macs: dict[str, float]
    kept: dict[str, float]


def count(config: NetworkConfig, batch: Batch) -> Totals:
    """Return the totals of a batch, in time that does not depend on the length of its sentences.

    All steps of an LSTM cost the same, and the cost of attention is proportional to the product of
    the source and target lengths. Totals are therefore quadratic in the length and linear in the
    number of sentences, so three short runs determine them.
    """
    lengths = (2, 3, 4)
    runs = [describe(config, replace(batch, sentences=1, length=length)) for length in lengths]
    shares = []
    for length in lengths:
        share = float(batch.sentences)
        for other in lengths:
            share *= 1 if other == length else (batch.length - other) / (length - other)
        shares.append(share)

    def fit(values: list[dict[str, Any]]) -> dict[str, float]:
        return {
            part: sum(share * value[part] for share, value in zip(shares, values, strict=True))
            for part in values[0]
        }

    return Totals(fit([run.macs() for run in runs]), fit([run.kept for run in runs]))


def build_modules(config: NetworkConfig, vocab_size: int) -> list[nn.Module]:
    """Build all modules except the softmax layer on the meta device."""
    with torch.device("meta"):
        embedding = nn.Embedding(vocab_size, config.model_dim)
        if isinstance(config, LSTMLMConfig):
            return [LSTMLanguageModel(config, embedding)]
        return [GNMTEncoder(config, embedding), GNMTDecoder(config, embedding)]


@lru_cache(maxsize=64)
def describe(config: NetworkConfig, batch: Batch) -> Network:
    """Run the forward pass of a training step, with the full softmax, on the meta device.

    Returns:
        The network's weights and products, and the bytes that the forward pass keeps.
    """
    modules = build_modules(config, batch.vocab_size)
    recorder = Recorder(modules)
    for module in modules:
        module.to(getattr(torch, batch.dtype)).train()
        for layer in module.modules():
            if isinstance(layer, MoELayer):
                recorder.network.num_moe_layers += 1
                _replace_forward(layer, partial(_mix, layer, recorder))
            elif isinstance(layer, nn.Dropout) and not batch.on_cpu and layer.p > 0:
                # GPUs keep a mask with one byte for each value; CPUs keep it in the values' dtype.
                _replace_forward(layer, partial(_fused_dropout, layer.p))
    with recorder.recording():
        tokens = torch.zeros(batch.sentences, batch.length, dtype=torch.int64, device="meta")
        recorder.own(tokens, "", "tokens")
        features = _forward(config, modules, tokens)
        recorder.part = "softmax"
        _classify(features, batch, recorder)
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.LSTM) and batch.on_cpu and not layer.proj_size:
                recorder.network.kept["LSTM"] += _onednn_bytes(layer, batch)
    return recorder.network


def _forward(config: NetworkConfig, modules: list[nn.Module], tokens: Tensor) -> Tensor:
    if isinstance(config, GNMTConfig):
        encoder, decoder = modules
        return decoder(tokens, encoder(tokens, tokens.bool())).features
    return modules[0](tokens).features


def _classify(features: Tensor, batch: Batch, recorder: Recorder) -> None:
    """Apply the softmax layer."""
    flat = features.reshape(batch.tokens, -1)
    weight = flat.new_empty(batch.vocab_size, flat.shape[1], requires_grad=True)
    recorder.own(weight, "softmax", "weight")
    F.linear(flat, weight).log_softmax(1, dtype=torch.float32)


def _replace_forward(module: nn.Module, forward: Callable) -> None:
    module.forward = forward  # type: ignore[method-assign]


def _fused_dropout(p: float, x: Tensor) -> Tensor:
    return torch.native_dropout(x, p, True)[0]


def _mix(layer: MoELayer, recorder: Recorder, x: Tensor, *_: Any) -> tuple[Tensor, None]:
    """Record the products of an MoE layer instead of running its forward pass."""
    config, tokens = layer.config, len(x)
    for name, weight in layer.gate.named_parameters():
        if is_matrix(name):
            rows, matrices = gate_products(config, weight, tokens)
            shape = weight.shape[-2], weight.shape[-1]
            recorder.add(Product("gates", name, rows, *shape, experts=matrices))
    rows = rows_per_token(config) * tokens
    for name, weight in layer.experts.named_parameters():
        shape = weight.shape[1], weight.shape[2]
        recorder.add(Product("experts", name, rows, *shape, experts=config.num_experts))
    return x * 1, None


def _onednn_bytes(layer: nn.LSTM, batch: Batch) -> float:
    """Return how many more bytes oneDNN's LSTM keeps than torch's own LSTM, as measured.

    On a CPU, torch uses oneDNN's LSTM if there is no projection. That LSTM keeps gates, states and
    space for all their gradients, a total of 15 + 12 / length numbers per cell and step. torch's
    own LSTM keeps 6.
    """
    return batch.tokens * (9 + 12 / batch.length) * layer.hidden_size * batch.number_bytes
