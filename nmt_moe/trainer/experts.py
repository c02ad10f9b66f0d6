"""Find the experts in the training state, and this rank's part of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from fairseq.utils import move_to_cpu
from torch import Tensor, nn

from nmt_moe.checkpoints import ByIndex, ByName, rows_of
from nmt_moe.moe import MoELayer
from nmt_moe.parallel import (
    ALONE,
    ExpertParallelGroup,
    cut_shard,
    is_expert,
    is_shard,
    shard_group,
)


def moe_layers(model: nn.Module) -> Iterator[MoELayer]:
    """Yield the MoE layers of a model."""
    return (module for module in model.modules() if isinstance(module, MoELayer))


def expert_group(model: nn.Module) -> ExpertParallelGroup:
    """Return the expert-parallel group of a model."""
    groups = (layer.group for layer in moe_layers(model) if layer.group.size > 1)
    return next(groups, ALONE)


def own_experts(model: nn.Module, masters: ByName) -> ByName:
    """Return this rank's experts by name, in the form that checkpoints store.

    Args:
        model: The model.
        masters: The float32 weights, by name, that are trained instead of the model's own.

    Returns:
        Tensors (L, ...) on the CPU.
    """
    named = model.named_parameters()
    own = {name: masters.get(name, p) for name, p in named if shard_group(p) is not None}
    return move_to_cpu({name: value.detach() for name, value in own.items()})


def own_expert_state(optimizer: Any) -> ByIndex:
    """Return the optimizer state of this rank's experts, one row for each expert."""
    states = optimizer.optimizer.state
    return {
        index: move_to_cpu(rows_of(states.get(p, {}), len(p)))
        for index, p in enumerate(optimizer.params)
        if is_shard(p)
    }


def name_experts(model: nn.Module, parameters: list[Tensor]) -> dict[int, str]:
    """Name the experts by their index among an optimizer's parameters.

    Args:
        model: The model.
        parameters: The optimizer's parameters, or copies of them. Experts keep their order in any
            grouping.

    Returns:
        The names; {} if the optimizer has no separate parameter for each expert, as with flat
        gradients.
    """
    named = [(name, p) for name, p in model.named_parameters() if is_expert(p)]
    indexed = [(index, p) for index, p in enumerate(parameters) if is_expert(p)]
    if [p.shape for _, p in named] != [p.shape for _, p in indexed]:
        return {}
    return {index: name for (name, _), (index, _) in zip(named, indexed, strict=True)}


def leave_out_experts(state: dict[str, Any], model: ByName, optimizer: ByIndex) -> None:
    """Remove from a checkpoint the experts that are in expert files.

    Args:
        state: Contents of the checkpoint; changed in place, except for the optimizer's own
            dictionaries.
        model: The experts' weights, by name.
        optimizer: Optimizer state of the experts, by index and name.
    """
    for name in model:
        del state["model"][name]
    saved = state.get("last_optimizer_state", {}).get("state", {})
    for index, values in optimizer.items():
        if index in saved:  # there is no state before the first update, nor in plain SGD
            saved[index] = {k: v for k, v in saved[index].items() if k not in values}


def cut_experts(
    state: dict[str, Any], names: Mapping[int, str], group: ExpertParallelGroup
) -> None:
    """Remove the experts of other ranks from a checkpoint with all experts.

    Args:
        state: Contents of the checkpoint; changed in place.
        names: The experts' names, by their index in the optimizer's state.
        group: The ranks that together hold every expert once.
    """
    saved = state.get("last_optimizer_state", {}).get("state", {})
    for index, name in names.items():
        whole = state["model"].get(name)
        if whole is None:  # another model: loading its parameters will report that
            continue
        state["model"][name] = cut_shard(whole, group)
        if index in saved:
            rows = rows_of(saved[index], len(whole))
            saved[index] |= {key: cut_shard(value, group) for key, value in rows.items()}
