"""Record the products that a network computes on the meta device, and the tensors it saves."""

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

# Parts of a network, by the class of their modules. A parameter belongs to the part of the
# innermost of these modules that contains it.
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
    """A matrix product of the forward pass, (rows, inner) @ (inner, cols), or several equal ones.

    Attributes:
        part: Part of the network.
        weight: Name of the parameter on the right; empty for a product of two activations.
        rows: Number of rows in one call; with `experts`, the total for all of them.
        inner: Size of the dimension that is summed over.
        cols: Number of columns of the result.
        steps: Number of sequential calls with the same matrix on the right.
        batch: Number of pairs of matrices in one call; the left matrix of each pair has `rows`
            rows.
        experts: Number of matrices on the right, among which the rows are divided.
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
        """Return the number of multiply-adds."""
        return self.steps * self.batch * self.rows * self.inner * self.cols


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        part: Part of the network.
        name: Name of the parameter within the network.
        shape: Shape of the parameter in torch.
        is_expert: Whether the parameter belongs to experts that can be spread over ranks.
    """

    part: str
    name: str
    shape: torch.Size
    is_expert: bool

    @property
    def size(self) -> int:
        """Return the number of values in the parameter."""
        return self.shape.numel()

    @property
    def factored_size(self) -> int:
        """Return the number of values in factored Adam's state, one per row and column."""
        return self.shape[:-2].numel() * (self.shape[-2] + self.shape[-1])

    @property
    def is_matrix(self) -> bool:
        """Return whether tokens are multiplied by the parameter, unlike biases and thresholds."""
        return is_matrix(self.name)


def is_matrix(name: str) -> bool:
    """Return whether tokens are multiplied by the parameter with this name."""
    return "bias" not in name and "threshold" not in name


@dataclass
class Network:
    """The weights and products of a forward pass, and the bytes that it keeps.

    Attributes:
        weights: All parameters except the weights of the embedding and the softmax layer.
        products: Matrix products; the last belongs to the softmax layer. Equal products with the
            same weight share an entry.
        kept: Bytes kept for the backward pass, by part of the network. MoE layers are left out,
            because `mixture` computes their bytes.
        num_moe_layers: Number of MoE layers with experts that can be spread over ranks.
    """

    weights: list[Weight] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    kept: dict[str, float] = field(default_factory=dict)
    num_moe_layers: int = 0

    def macs(self) -> dict[str, int]:
        """Return the number of multiply-adds in the forward pass, by part of the network."""
        found: dict[str, int] = {}
        for product in self.products:
            found[product.part] = found.get(product.part, 0) + product.macs
        return found


class Recorder(TorchDispatchMode):
    """A recorder of the products and saved tensors of modules on the meta device."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.network = Network()
        self.part = "other"
        self._modules = modules
        self._parameters: dict[int, tuple[str, str]] = {}
        self._known: dict[int, Any] = {}  # storages of parameters and of saved tensors
        self._index: dict[tuple, int] = {}

    def own(self, parameter: Tensor, part: str, name: str) -> None:
        """Register a tensor that is not an activation but a parameter or the input."""
        storage = parameter.untyped_storage()
        self._parameters[storage._cdata] = part, name
        self._known[storage._cdata] = storage

    def keep(self, part: str, count: float) -> None:
        """Add bytes kept for the backward pass."""
        self.network.kept[part] = self.network.kept.get(part, 0) + count

    def add(self, product: Product, owner: int = 0) -> None:
        """Record a product. If it has been recorded before, count another step of it."""
        key = (owner, product) if owner else (len(self.network.products), product)
        if key not in self._index:
            self._index[key] = len(self.network.products)
            self.network.products.append(product)
            return
        index = self._index[key]
        known = self.network.products[index]
        # All inputs to an LSTM are known in advance, so the device multiplies them in one product.
        if "_ih" in product.weight:
            known = replace(known, rows=known.rows + product.rows)
        else:
            known = replace(known, steps=known.steps + 1)
        self.network.products[index] = known

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record everything called within the context."""
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
        """Return to the enclosing part.

        At the top level, the part does not change, so that a dropout layer that follows belongs to
        it.
        """
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
    """Return the part of every module, by the module's name.

    If a module's class is not in `PARTS`, the module belongs to the part of the enclosing module.
    """
    found = {"": "other"}
    for name, module in network.named_modules():
        if name:
            own = [part for kind, part in PARTS.items() if isinstance(module, kind)]
            found[name] = own[0] if own else found[name.rpartition(".")[0]]
    return found
