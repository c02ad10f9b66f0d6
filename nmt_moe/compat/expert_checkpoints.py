"""Save experts that are spread over processes beside the checkpoint, and read them back."""

import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from torch import Tensor

from nmt_moe.checkpoints.expert_files import (
    MANIFEST,
    PLACES,
    ByName,
    ByPlace,
    remove_unused_files,
    restore_experts,
    rows_of,
    save_experts,
)
from nmt_moe.compat._replace import replace
from nmt_moe.compat.expert_parallel import expert_group, moe_layers
from nmt_moe.parallel import ExpertParallelGroup, cut_shard, is_expert, shard_group

logger = logging.getLogger(__name__)

# Attribute of the trainer while it saves.
SAVED_EXPERTS = "_nmt_moe_saved_experts"

# Key in a checkpoint's extra state.
NUM_PROCESSES = "num_processes"

# The trainer that reads, if any: it wants its own experts and their optimizer state.
_TRAINER: ContextVar[Trainer | None] = ContextVar("trainer", default=None)


def save_and_load_spread_experts() -> None:
    """Let each process write its own experts, and any number of processes read them.

    Beside the checkpoint stand files of experts (`checkpoints.expert_files`), each written by the
    process that has them; the checkpoint holds the rest and their digests. Whoever reads the
    checkpoint gets them with it: a training each process' own, every other command all. So a
    training goes on with any other number of processes, and no process needs memory for all.

    Reasons: fairseq saves what process 0 has, and the experts of all others would be lost; and it
    saves the place in an epoch as the batches that each process has seen, which is another place
    with another number of processes.
    """
    replace(checkpoint_utils, "save_checkpoint", _saving_experts)
    replace(Trainer, "state_dict", _leaving_out_experts)
    replace(Trainer, "save_checkpoint", _saving)
    replace(Trainer, "load_checkpoint", _loading)
    replace(Trainer, "_build_optimizer", _building_optimizer)


def _saving_experts(save: Callable) -> Callable:
    def save_checkpoint(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        group = expert_group(trainer.get_model())
        if group is None or cfg.no_save:
            return save(cfg, trainer, *args, **kwargs)
        folder = Path(cfg.save_dir)
        num_experts = next(moe_layers(trainer.get_model())).config.num_experts
        model, optimizer = own_experts(trainer), own_expert_state(trainer)
        manifest = save_experts(folder, num_experts, model, optimizer, group)
        setattr(trainer, SAVED_EXPERTS, manifest)
        try:
            saved = save(cfg, trainer, *args, **kwargs)
        finally:
            setattr(trainer, SAVED_EXPERTS, None)
        if trainer.data_parallel_rank == 0:
            clean(folder)
        return saved

    return save_checkpoint


def clean(folder: Path) -> None:
    """Delete files of experts whose checkpoints fairseq has replaced or deleted."""
    try:
        remove_unused_files(folder)
    except ValueError as error:
        logger.warning("%s", error)


def own_experts(trainer: Trainer) -> ByName:
    """Return this process' experts by name."""
    named = trainer.get_model().named_parameters()
    return {name: p.detach().cpu() for name, p in named if shard_group(p) is not None}


def own_expert_state(trainer: Trainer) -> ByPlace:
    """Return what the optimizer knows of this process' experts, one row for each."""
    if trainer.cfg.checkpoint.no_save_optimizer_state:
        return {}
    states = trainer.optimizer.optimizer.state
    return {
        place: {name: value.cpu() for name, value in rows_of(states.get(p, {}), len(p)).items()}
        for place, p in expert_places(trainer.optimizer)
    }


def expert_places(optimizer: Any) -> list[tuple[int, Tensor]]:
    """List the optimizer's experts with their numbers in its state dict."""
    return [(place, p) for place, p in enumerate(optimizer.params) if hasattr(p, "expert")]


def _leaving_out_experts(make_state: Callable) -> Callable:
    def state_dict(self: Trainer) -> dict[str, Any]:
        state = make_state(self)
        extra = state["extra_state"]
        extra[NUM_PROCESSES] = self.data_parallel_world_size
        places = name_expert_places(self)
        if places:
            extra[PLACES] = places
        manifest = getattr(self, SAVED_EXPERTS, None)
        if manifest is None:
            return state
        state[MANIFEST] = manifest
        for name in own_experts(self):
            del state["model"][name]
        if "last_optimizer_state" in state:
            saved = state["last_optimizer_state"]["state"]
            for place, values in own_expert_state(self).items():
                rest = {k: v for k, v in saved[place].items() if k not in values}
                saved[place] = rest  # the old one is the optimizer's own
        return state

    return state_dict


def name_expert_places(trainer: Trainer) -> dict[int, str]:
    """Name the experts by their numbers in the optimizer's state; {} where it has none for each."""
    named = [(name, p) for name, p in trainer.get_model().named_parameters() if is_expert(p)]
    # However an optimizer groups or copies parameters, experts keep their order.
    places = [(place, p) for place, p in enumerate(trainer.optimizer.params) if is_expert(p)]
    if [p.shape for _, p in named] != [p.shape for _, p in places]:  # flattened, say
        return {}
    return {place: name for (name, _), (place, _) in zip(named, places, strict=True)}


def _saving(save: Callable) -> Callable:
    def save_checkpoint(self: Trainer, filename: str, extra_state: dict[str, Any]) -> Any:
        # After an error one process alone saves, and the others' experts would be missing.
        is_spread = expert_group(self.get_model()) is not None
        if is_spread and getattr(self, SAVED_EXPERTS, None) is None:
            logger.warning("not saving %s, as other processes have experts of it", filename)
            return None
        return save(self, filename, extra_state)

    return save_checkpoint


def _loading(load: Callable) -> Callable:
    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        if expert_group(self.get_model()) is not None:
            # Each process reads its own experts.
            self.cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        token = _TRAINER.set(self)
        try:
            extra_state = load(self, *args, **kwargs)
        finally:
            _TRAINER.reset(token)
        if extra_state is not None:
            now = self.data_parallel_world_size
            before = extra_state.get(NUM_PROCESSES, now)
            place = extra_state["train_iterator"]
            # Rounded down, a few batches are seen twice.
            place["iterations_in_epoch"] = place.get("iterations_in_epoch", 0) * before // now
        return extra_state

    return load_checkpoint


def complete(path: str, state: dict[str, Any]) -> None:
    """Put experts into a checkpoint that was read: all, or in a training this process' own."""
    manifest, trainer = state.get(MANIFEST), _TRAINER.get()
    if manifest is None:
        return
    group = None if trainer is None else expert_group(trainer.get_model())
    owned = None if group is None else group.owned(manifest["num_experts"])
    restore_experts(Path(path), state, owned, with_optimizer=trainer is not None)


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
    """Take this process' slices out of the optimizer state of all experts; keep what is cut."""
    saved = dict(state["state"])
    for place, parameter in expert_places(optimizer):
        if place in saved:
            num_experts = len(parameter) * group.size
            rows = rows_of(saved[place], num_experts)
            saved[place] = saved[place] | {k: cut_shard(v, group) for k, v in rows.items()}
    return {**state, "state": saved}
