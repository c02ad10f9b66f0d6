"""Make fairseq use this package's classes where fairseq has no registry."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from fairseq import checkpoint_utils, models, trainer
from fairseq.models import distributed_fairseq_model

from nmt_moe.compat._replace import replace
from nmt_moe.trainer.data_parallel import ExpertParallelDataParallel
from nmt_moe.trainer.expert_parallel_trainer import ExpertParallelTrainer
from nmt_moe.trainer.reading import reading_all_experts


def install() -> None:
    """Install the trainer, its data-parallel wrapper and its checkpoint reader and writer."""
    # fairseq-train imports `Trainer` before it loads plugins, so the module of fairseq-train must
    # be patched too. Under `python -m`, that module is `__main__`.
    for module in (trainer, sys.modules.get("fairseq_cli.train"), sys.modules["__main__"]):
        if getattr(module, "Trainer", None) is ExpertParallelTrainer.__base__:
            vars(module)["Trainer"] = ExpertParallelTrainer
    distributed_fairseq_model.LegacyDistributedDataParallel = ExpertParallelDataParallel
    replace(checkpoint_utils, "save_checkpoint", _saving)
    replace(checkpoint_utils, "load_checkpoint_to_cpu", reading_all_experts)
    replace(models, "build_model", _building)


def _saving(save: Callable) -> Callable:
    def save_checkpoint(
        cfg: Any, trainer: ExpertParallelTrainer, epoch_itr: Any, val_loss: float | None
    ) -> Any:
        with trainer.saving_experts():
            return save(cfg, trainer, epoch_itr, val_loss)

    return save_checkpoint


def _building(build: Callable) -> Callable:
    def build_model(cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
        if from_checkpoint and "expert_parallel_size" in cfg:
            # Outside training, processes do not run in lockstep, so each holds all experts.
            cfg.expert_parallel_size = 1
        if not from_checkpoint:
            # With many experts, Adam's averages of gradients that stay zero shrink until they are
            # denormal, and Intel's processors are slow with such numbers. Threads inherit this
            # setting from the thread that starts them, so it must precede the first operation that
            # uses several threads.
            torch.set_flush_denormal(True)
        return build(cfg, task, from_checkpoint)

    return build_model
