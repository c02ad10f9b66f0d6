"""What a network on the meta device computes and keeps: its matrix products and saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmt_moe.nn import BidirectionalLSTM
from nmt_moe.nn.attention import Attention, AttentionKeys
from nmt_moe.nn.attentive_lstm import AttentiveLSTM
from nmt_moe.nn.lstm_lm import ResidualDeepExpert
from nmt_moe.nn.residual_moe import ResidualMoE
from nmt_moe.parallel import is_expert

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


class Recorder(TorchDispatchMode):
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
