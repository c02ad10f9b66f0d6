"""MoE layers with a common interface: nmt_moe's own layers, and layers written in plain torch."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.moe_limits import fill_from
from benchmarks.moe_points import Point
from nmt_moe.moe import MoELayer
from nmt_moe.moe.losses import importance_loss, load_loss

# If a library has a capacity, it is set to a quarter more than the mean load.
CAPACITY = 1.25
Answer = tuple[Tensor, Tensor | None]


class Layer(nn.Module):
    """A layer that maps tokens (N, D) to outputs (N, D) and a balance loss or None.

    `capacity` is the maximum number of tokens per expert divided by the mean, for libraries with a
    limit.

    Attributes:
        notes: How this layer differs from the requested one.
        most_k: The largest number of experts per token that the library supports.
        package: The names under which the library is imported and installed; None if the layer
            belongs to this project.
        has_backward: Whether the layer has a backward pass.
        top_k: Experts per token in this layer.
    """

    notes = ""
    most_k = 1_000_000
    package: tuple[str, str] | None = None
    has_backward = True

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__()
        self.point = point
        self.top_k = min(point.top_k, self.most_k, point.num_experts)

    def forward(self, x: Tensor) -> Answer:
        """Compute the outputs and the balance loss."""
        raise NotImplementedError

    def gate_weights(self) -> list[Tensor]:
        """List views (..., D, E) of the parameters from which the logits are computed."""
        raise NotImplementedError

    def noise_weights(self) -> list[Tensor]:
        """List the parameters of the noise."""
        return []

    def expert(self, e: int, x: Tensor) -> Tensor:
        """Apply one expert to all tokens."""
        raise NotImplementedError

    def gates(self, x: Tensor) -> Tensor:
        """Compute the gates (N, E) of an evaluation pass, a softmax over the k largest logits."""
        (weight,) = self.gate_weights()
        return softmax_of_largest(x @ weight, self.top_k)

    def dense(self, x: Tensor) -> Tensor:
        """Compute the output of an evaluation pass from the outputs of all experts."""
        gates = self.gates(x)
        experts = range(self.point.num_experts)
        return torch.stack([gates[:, e, None] * self.expert(e, x) for e in experts]).sum(0)

    def expert_modules(self) -> list[nn.Module]:
        """List the modules whose nonzero input rows are the computed pairs.

        An empty list means that nothing is ever dropped.
        """
        return []

    def computed_pairs(self, x: Tensor) -> int:
        """Count the (token, expert) pairs computed during training."""
        pairs = 0

        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal pairs
            pairs += int((inputs[0].flatten(0, -2) != 0).any(1).sum())

        modules = self.expert_modules()
        if not modules:
            return len(x) * self.top_k
        hooks = [module.register_forward_pre_hook(count) for module in modules]
        self.train()
        with torch.no_grad():
            self(x)
        for hook in hooks:
            hook.remove()
        return pairs


def softmax_of_largest(logits: Tensor, top_k: int) -> Tensor:
    """Compute the softmax over the k largest values of each row; all other values become 0."""
    top, ids = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, ids, top.softmax(-1))


class OwnLayer(Layer):
    """nmt_moe's layer with the paper's noisy gate and both balance losses."""

    notes = "noisy top-k gate, importance and load loss"
    is_hierarchical = False

    def __init__(self, point: Point, capacity: float) -> None:
        super().__init__(point, capacity)
        self.moe = MoELayer(point.config(self.is_hierarchical))

    def forward(self, x: Tensor) -> Answer:
        y, stats = self.moe(x)
        return y, stats.balance_loss

    def gate_alone(self, x: Tensor) -> Tensor:
        """Compute a scalar that depends on all outputs of the gate."""
        out, config = self.moe.gate(x), self.moe.config
        loss = importance_loss(out.importance, config.importance_weight)
        loss = loss + load_loss(out.load, config.load_weight)
        return loss + out.gates.square().mean()

    def gate_weights(self) -> list[Tensor]:
        return [self.moe.gate.gate_weight]

    def noise_weights(self) -> list[Tensor]:
        return [self.moe.gate.noise_weight]

    def expert(self, e: int, x: Tensor) -> Tensor:
        experts = self.moe.experts
        return torch.relu(x @ experts.weight_in[e]) @ experts.weight_out[e]

    def computed_pairs(self, x: Tensor) -> int:
        self.train()
        with torch.no_grad():
            return int(self.moe(x)[1].tokens_per_expert.sum())


class OwnHierarchicalLayer(OwnLayer):
    """nmt_moe's layer with two levels of gates."""

    notes = "noisy top-k at both levels, sqrt(k) groups with sqrt(k) experts each, both losses"
    is_hierarchical = True

    def gate_weights(self) -> list[Tensor]:
        return [self.moe.gate.primary.gate_weight, self.moe.gate.secondary.gate_weight]

    def noise_weights(self) -> list[Tensor]:
        return [self.moe.gate.primary.noise_weight, self.moe.gate.secondary.noise_weight]

    def gates(self, x: Tensor) -> Tensor:
        primary, secondary = self.gate_weights()
        top_k = self.moe.config.top_k
        of_groups = softmax_of_largest(x @ primary, top_k)  # (N, G)
        within = softmax_of_largest(torch.einsum("nd,gde->nge", x, secondary), top_k)
        return (of_groups.unsqueeze(2) * within).flatten(1)


class PlainLayer(OwnLayer):
    """A layer with nmt_moe's gate and torch's own operations for everything else."""

    def forward(self, x: Tensor) -> Answer:
        out, config = self.moe.gate(x), self.moe.config
        sorted_ids, order = out.expert_ids.flatten().sort(stable=True)
        token = order // out.expert_ids.shape[1]
        ends = torch.searchsorted(
            sorted_ids, torch.arange(1, config.num_experts + 1, device=x.device)
        )
        answers = self.apply_experts(x.index_select(0, token), ends)
        weighted = answers * out.gates.flatten()[order].unsqueeze(1).to(x.dtype)
        y = torch.zeros_like(x).index_add(0, token, weighted)
        loss = importance_loss(out.importance, config.importance_weight)
        return y, loss + load_loss(out.load, config.load_weight)

    def apply_experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Apply the experts to sorted rows (R, D). The rows of expert e end before `ends[e]`."""
        raise NotImplementedError

    def computed_pairs(self, x: Tensor) -> int:
        return len(x) * self.top_k


class LoopLayer(PlainLayer):
    """A layer that loops over the experts in Python."""

    notes = "nmt_moe's gate, then index_select, a Python loop of mm, index_add"

    def apply_experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        weights = zip(self.moe.experts.weight_in, self.moe.experts.weight_out, strict=True)
        return torch.cat(
            [
                torch.relu(run @ weight_in) @ weight_out
                for run, (weight_in, weight_out) in zip(rows.split(sizes), weights, strict=True)
                if len(run)
            ]
        )


class GroupedLayer(PlainLayer):
    """A layer that uses torch's grouped product."""

    notes = "nmt_moe's gate, then index_select, torch's grouped_mm, index_add"

    def apply_experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        offsets = ends.to(torch.int32)
        experts = self.moe.experts
        hidden = torch.relu(F.grouped_mm(rows, experts.weight_in, offs=offsets))
        return F.grouped_mm(hidden, experts.weight_out, offs=offsets)


OWN: dict[str, type[Layer]] = {
    "nmt_moe": OwnLayer,
    "nmt_moe_adam": OwnLayer,
    "nmt_moe_hierarchical": OwnHierarchicalLayer,
}
# These layers need only torch and belong to no library; they run only when requested.
PLAIN: dict[str, type[Layer]] = {"torch_loop": LoopLayer, "torch_grouped_mm": GroupedLayer}


def build_layer(
    layer_class: type[Layer], point: Point, device: str, capacity: float = CAPACITY
) -> Layer:
    """Make a layer with random weights that give logits with a standard deviation of 1.

    Experts therefore get unequal numbers of tokens, as in training. The noise weights have their
    initial value, 0, so the scale of the noise is softplus(0) + 0.01.
    """
    torch.manual_seed(0)
    with _without_initialisation():
        layer = layer_class(point, capacity)
    dtype = getattr(torch, point.dtype)
    layer.to(device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(1_000_003, generator=generator).to(device, dtype)
    block *= point.model_dim**-0.5
    start = 0
    with torch.no_grad():
        for parameter in layer.parameters():
            start = fill_from(parameter, block, start)
        for weight in layer.gate_weights():
            random = torch.randn(weight.shape, generator=generator) * point.model_dim**-0.5
            weight.copy_(random)
        for weight in layer.noise_weights():
            weight.zero_()
    return layer


@contextlib.contextmanager
def _without_initialisation() -> Iterator[None]:
    """Skip initialisation, because drawing the weights of a thousand experts takes minutes."""
    with (
        mock.patch.object(nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor),
        mock.patch.object(nn.init, "uniform_", lambda tensor, *_, **__: tensor),
    ):
        yield
