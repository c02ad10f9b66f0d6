"""Save experts that are spread over processes in one ordinary checkpoint, and take it apart."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from torch import Tensor

from nmt_moe.compat._replace import replace
from nmt_moe.compat.expert_parallel import expert_group
from nmt_moe.parallel import ExpertParallelGroup, cut_shard, gather_shards, shard_group

logger = logging.getLogger(__name__)

# Attribute of the trainer while it saves.
WHOLE = "_nmt_moe_whole_experts"

# Key in a checkpoint's extra state.
NUM_PROCESSES = "num_processes"


@dataclass(frozen=True)
class WholeExperts:
    """All experts and their optimizer state on the CPU of process 0; empty on the others.

    Attributes:
        model: (E, ...) parameters by name.
        optimizer: (E, ...) state by the parameter's place in the optimizer, and name.
    """

    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]


def save_and_load_spread_experts() -> None:
    """Let checkpoints of any number of processes be those of one process.

    Process 0 collects all experts, tensor by tensor, and writes the same file as one process with
    all experts would; each process takes its own out of it. So a training goes on with any other
    number of processes, and every command reads the file.

    Reasons: fairseq saves what process 0 has, and the experts of all others would be lost; and it
    saves the place in an epoch as the batches that each process has seen, which is another place
    with another number of processes.
    """
    replace(checkpoint_utils, "save_checkpoint", _collecting)
    replace(Trainer, "state_dict", _completing)
    replace(Trainer, "save_checkpoint", _saving)
    replace(Trainer, "load_checkpoint", _loading)
    replace(Trainer, "_build_optimizer", _building_optimizer)


def _collecting(save: Callable) -> Callable:
    def save_checkpoint(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        group = expert_group(trainer.get_model())
        if group is None or cfg.no_save:
            return save(cfg, trainer, *args, **kwargs)
        setattr(trainer, WHOLE, collect_experts(trainer, group))
        try:
            return save(cfg, trainer, *args, **kwargs)
        finally:
            setattr(trainer, WHOLE, None)

    return save_checkpoint


def collect_experts(trainer: Trainer, group: ExpertParallelGroup) -> WholeExperts:
    """Gather all experts and their optimizer state; all processes must call.

    Process 0 needs main memory for all of it: with Adam, three times the experts.
    """
    model = {}
    for name, parameter in trainer.get_model().named_parameters():
        if shard_group(parameter) is not None:
            whole = gather_shards(parameter, group)
            if whole is not None:
                model[name] = whole
    optimizer: dict[int, dict[str, Tensor]] = {}
    if trainer.cfg.checkpoint.no_save_optimizer_state:
        return WholeExperts(model, optimizer)
    states = trainer.optimizer.optimizer.state
    for place, parameter in expert_places(trainer.optimizer):
        for name, value in sorted(states.get(parameter, {}).items()):
            if has_rows(value, len(parameter)):
                whole = gather_shards(value, group)
                if whole is not None:
                    optimizer.setdefault(place, {})[name] = whole
    return WholeExperts(model, optimizer)


def expert_places(optimizer: Any) -> list[tuple[int, Tensor]]:
    """List the optimizer's experts with their numbers in its state dict."""
    return [(place, p) for place, p in enumerate(optimizer.params) if hasattr(p, "expert")]


def has_rows(value: Any, count: int) -> bool:
    """Return whether a part of an optimizer's state has one row for each of `count` experts."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count


def _completing(make_state: Callable) -> Callable:
    def state_dict(self: Trainer) -> dict[str, Any]:
        state = make_state(self)
        state["extra_state"][NUM_PROCESSES] = self.data_parallel_world_size
        whole: WholeExperts | None = getattr(self, WHOLE, None)
        if whole is not None:
            state["model"].update(whole.model)
            for place, values in whole.optimizer.items():
                saved = state["last_optimizer_state"]["state"]
                saved[place] = {**saved[place], **values}  # the old one is the optimizer's own
        return state

    return state_dict


def _saving(save: Callable) -> Callable:
    def save_checkpoint(self: Trainer, filename: str, extra_state: dict[str, Any]) -> Any:
        # After an error one process alone saves, and cannot ask the others for their experts.
        if expert_group(self.get_model()) is not None and getattr(self, WHOLE, None) is None:
            logger.warning("not saving %s, as other processes have experts of it", filename)
            return None
        return save(self, filename, extra_state)

    return save_checkpoint


def _loading(load: Callable) -> Callable:
    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        extra_state = load(self, *args, **kwargs)
        if extra_state is not None:
            now = self.data_parallel_world_size
            before = extra_state.get(NUM_PROCESSES, now)
            place = extra_state["train_iterator"]
            # Rounded down, a few batches are seen twice.
            place["iterations_in_epoch"] = place.get("iterations_in_epoch", 0) * before // now
        return extra_state

    return load_checkpoint


def _building_optimizer(build: Callable) -> Callable:
    def _build_optimizer(self: Trainer) -> None:
        build(self)
        group = expert_group(self.get_model())
        if group is None:
            return
        optimizer, load = self._optimizer, self._optimizer.load_state_dict

        def load_state_dict(state: dict[str, Any], optimizer_overrides: Any = None) -> None:
            load(cut_optimizer_state(state, optimizer, group), optimizer_overrides)

        optimizer.load_state_dict = load_state_dict

    return _build_optimizer


def cut_optimizer_state(
    state: dict[str, Any], optimizer: Any, group: ExpertParallelGroup
) -> dict[str, Any]:
    """Take this process' slices out of the optimizer state of all experts."""
    saved = dict(state["state"])
    for place, parameter in expert_places(optimizer):
        if place in saved:
            num_experts = len(parameter) * group.size
            saved[place] = {
                name: cut_shard(value, group) if has_rows(value, num_experts) else value
                for name, value in saved[place].items()
            }
    return {**state, "state": saved}
