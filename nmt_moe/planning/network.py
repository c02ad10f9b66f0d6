"""The one description of a network: its parameters, matrix products and activations.

Modules are built and run on the meta device, which holds shapes but no numbers, so that a model of
137 billion parameters takes no memory. torch reports every matrix product and every tensor that the
forward pass saves for the backward pass; a new layer made of torch's operations needs nothing here.
Only the MoE layer, whose fused operations read the values of tensors, is stated in `mixture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nmt_moe.moe import MoELayer
from nmt_moe.nn import (
    BidirectionalLSTM,
    GNMTConfig,
    GNMTDecoder,
    GNMTEncoder,
    LSTMLanguageModel,
    LSTMLMConfig,
)
from nmt_moe.nn.attention import Attention, AttentionKeys
from nmt_moe.nn.attentive_lstm import AttentiveLSTM
from nmt_moe.nn.lstm_lm import ResidualDeepExpert
from nmt_moe.nn.residual_moe import ResidualMoE
from nmt_moe.parallel import is_expert
from nmt_moe.planning.architectures import NetworkConfig
from nmt_moe.planning.batch import Batch
from nmt_moe.planning.mixture import gate_products, rows_per_token

# Parts of a network, by the class of a module; what a module holds belongs to the innermost.
PARTS: dict[type[nn.Module], str] = {
    nn.Embedding: "embeddings",
    BidirectionalLSTM: "LSTM",
    nn.LSTM: "LSTM",
    AttentiveLSTM: "LSTM",
    Attention: "attention",
    AttentionKeys: "attention",
    ResidualMoE: "experts",
    ResidualDeepExpert: "experts",
}
PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1, "mv": 0}


@dataclass(frozen=True)
class Product:
    """Matrix products of the forward pass, each (rows, inner) @ (inner, cols).

    Attributes:
        part: Of the network.
        weight: Name of the parameter on the right; empty for a product of two activations.
        rows: Of one call; with `experts`, of all of them.
        inner: The dimension summed over.
        cols: Of the result.
        steps: Calls that wait for one another and share the right-hand matrix.
        batch: Pairs of matrices, each with `rows` of its own, in one call.
        experts: Right-hand matrices that share the rows among them.
    """

    part: str
    weight: str
    rows: int
    inner: int
    cols: int
    steps: int = 1
    batch: int = 1
    experts: int = 1

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.steps * self.batch * self.rows * self.inner * self.cols


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        part: Of the network.
        name: Within its network.
        shape: As torch has it.
        is_expert: Whether it belongs to experts that ranks can share.
    """

    part: str
    name: str
    shape: torch.Size
    is_expert: bool

    @property
    def size(self) -> int:
        """Numbers."""
        return self.shape.numel()

    @property
    def factored_size(self) -> int:
        """Rows and columns of its matrices, which factored Adam keeps."""
        return self.shape[:-2].numel() * (self.shape[-2] + self.shape[-1])

    @property
    def is_matrix(self) -> bool:
        """Whether tokens are multiplied with it; biases and thresholds are added or compared."""
        return is_matrix(self.name)


def is_matrix(name: str) -> bool:
    """Return whether tokens are multiplied with a parameter."""
    return "bias" not in name and "threshold" not in name


@dataclass
class Network:
    """What the forward pass of a batch does and keeps.

    Attributes:
        weights: All but the embedding and the softmax layer.
        products: Equal products of one weight are one entry; the softmax layer's is the last.
        kept: Bytes kept for the backward pass, by part; without MoE layers' own (`mixture`).
        num_moe_layers: MoE layers whose experts can be spread over ranks.
    """

    weights: list[Weight] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    kept: dict[str, float] = field(default_factory=dict)
    num_moe_layers: int = 0

    def macs(self) -> dict[str, int]:
        """Return the multiply-adds of the batch, by part."""
        found: dict[str, int] = {}
        for product in self.products:
            found[product.part] = found.get(product.part, 0) + product.macs
        return found


@dataclass(frozen=True)
class Totals:
    """Of a batch, by part: multiply-adds of the forward pass, and bytes that it keeps."""

    macs: dict[str, float]
    kept: dict[str, float]


def count(config: NetworkConfig, batch: Batch) -> Totals:
    """Return the totals of a batch, in a time that does not grow with its length.

    Steps of LSTMs cost alike and attention costs the product of both lengths, so totals are
    quadratic in the length and linear in the sentences: three short runs fix them.
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
    """Build all but the softmax layer on the meta device."""
    with torch.device("meta"):
        embedding = nn.Embedding(vocab_size, config.model_dim)
        if isinstance(config, LSTMLMConfig):
            return [LSTMLanguageModel(config, embedding)]
        return [GNMTEncoder(config, embedding), GNMTDecoder(config, embedding)]


@lru_cache(maxsize=64)
def describe(config: NetworkConfig, batch: Batch) -> Network:
    """Run a training step's forward pass, with the full softmax, on the meta device."""
    modules = build_modules(config, batch.vocab_size)
    recorder = _Recorder(modules)
    for module in modules:
        module.to(getattr(torch, batch.dtype)).train()
        for layer in module.modules():
            if isinstance(layer, MoELayer):
                recorder.network.num_moe_layers += 1
                _replace_forward(layer, partial(_mix, layer, recorder))
            elif isinstance(layer, nn.Dropout) and not batch.on_cpu and layer.p > 0:
                # GPUs keep a mask of a byte for each number, CPUs one of numbers.
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


def _classify(features: Tensor, batch: Batch, recorder: _Recorder) -> None:
    """Apply the softmax layer."""
    flat = features.reshape(batch.tokens, -1)
    weight = flat.new_empty(batch.vocab_size, flat.shape[1], requires_grad=True)
    recorder.own(weight, "softmax", "weight")
    F.linear(flat, weight).log_softmax(1, dtype=torch.float32)


def _replace_forward(module: nn.Module, forward: Callable) -> None:
    module.forward = forward  # type: ignore[method-assign]


def _fused_dropout(p: float, x: Tensor) -> Tensor:
    return torch.native_dropout(x, p, True)[0]


def _mix(layer: MoELayer, recorder: _Recorder, x: Tensor, *_: Any) -> tuple[Tensor, None]:
    """Replace the forward pass of an MoE layer: note its products alone."""
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
    """Return what oneDNN's workspace holds above torch's own LSTM, as measured.

    CPUs run oneDNN's LSTM where there is no projection: gates, states and room for all their
    gradients, (15 + 12 / length) numbers a cell where torch's own keeps 6.
    """
    return batch.tokens * (9 + 12 / batch.length) * layer.hidden_size * batch.number_bytes


class _Recorder(TorchDispatchMode):
    """Note the products and saved tensors of modules on the meta device."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.network = Network()
        self.part = "other"
        self._modules = modules
        self._parameters: dict[int, tuple[str, str]] = {}
        self._known: dict[int, Any] = {}  # saved once, or a parameter
        self._index: dict[tuple, int] = {}

    def own(self, parameter: Tensor, part: str, name: str) -> None:
        """Know a tensor that is not an activation: a parameter, or the input."""
        storage = parameter.untyped_storage()
        self._parameters[storage._cdata] = part, name
        self._known[storage._cdata] = storage

    def keep(self, part: str, count: float) -> None:
        """Add bytes kept for the backward pass."""
        self.network.kept[part] = self.network.kept.get(part, 0) + count

    def add(self, product: Product, owner: int = 0) -> None:
        """Note a product; the same once more is a step of the first."""
        key = (owner, product) if owner else (len(self.network.products), product)
        if key not in self._index:
            self._index[key] = len(self.network.products)
            self.network.products.append(product)
            return
        index = self._index[key]
        known = self.network.products[index]
        # The inputs of an LSTM are all there, so its device multiplies them at once.
        if "_ih" in product.weight:
            known = replace(known, rows=known.rows + product.rows)
        else:
            known = replace(known, steps=known.steps + 1)
        self.network.products[index] = known

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is called inside."""
        removable = []
        for network in self._modules:
            parts = _find_parts(network)
            for name, module in network.named_modules():
                if type(module) in PARTS or issubclass(type(module), Attention):
                    removable.append(module.register_forward_pre_hook(self._enter(parts[name])))
                    removable.append(module.register_forward_hook(self._leave(parts, name)))
            for name, parameter in network.named_parameters():
                part = parts[name.rpartition(".")[0]]
                if ".gate." in name:
                    part = "gates"
                self.own(parameter, part, name)
                if part != "embeddings":
                    weight = Weight(part, name, parameter.shape, is_expert(parameter))
                    self.network.weights.append(weight)
        with self, torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield
        for hook in removable:
            hook.remove()

    def _enter(self, part: str) -> Callable:
        def enter(*_: Any) -> None:
            self.part = part

        return enter

    def _leave(self, parts: dict[str, str], name: str) -> Callable:
        """Return to the part around; what follows at the top, as dropout, belongs to this part."""
        around = parts[name.rpartition(".")[0]]

        def leave(*_: Any) -> None:
            self.part = around if around != "other" else self.part

        return leave

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and tensor.device.type == "meta":
            self._known[storage._cdata] = storage
            self.keep(self.part, storage.nbytes())
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        first = PRODUCTS.get(func._schema.name.removeprefix("aten::"))
        if first is not None:
            left, right = args[first], args[first + 1]
            owner = right.untyped_storage()._cdata
            if owner not in self._parameters:
                owner_of_left = left.untyped_storage()._cdata
                owner = owner_of_left if owner_of_left in self._parameters else 0
            part, name = self._parameters.get(owner, (self.part, ""))
            rows, inner = left.shape[-2:]
            cols = right.shape[-1] if right.dim() > 1 else 1
            batch = left.shape[0] if left.dim() == 3 else 1
            product = Product(part, name, rows, inner, cols, batch=batch)
            self.add(product, owner or id(self._parameters))
        return func(*args, **(kwargs or {}))


def _find_parts(network: nn.Module) -> dict[str, str]:
    """Return the part of every module, by name: its own, or that of the module around it."""
    found = {"": "other"}
    for name, module in network.named_modules():
        if name:
            own = [part for kind, part in PARTS.items() if isinstance(module, kind)]
            found[name] = own[0] if own else found[name.rpartition(".")[0]]
    return found
