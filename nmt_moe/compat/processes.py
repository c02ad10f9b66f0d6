"""Several processes on CPU: let torchrun's work, and refuse those that would never start."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils

from nmt_moe.compat._replace import replace
from nmt_moe.compat.batches import cut_batches_again_each_epoch
from nmt_moe.compat.expert_parallel import serve_after_scoring

logger = logging.getLogger(__name__)

# What torchrun tells each process that it starts.
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def let_torchrun_train_on_cpu() -> None:
    """Take rank and world size from torchrun also where there is no CUDA device.

    Reason: fairseq computes `rank % cuda.device_count()`, a division by zero.
    """
    replace(distributed_utils, "_infer_torch_distributed_launch_init", _inferring)


def _inferring(infer: Callable) -> Callable:
    def infer_torch_distributed_launch_init(cfg: Any) -> None:
        if torch.cuda.device_count() > 0:
            infer(cfg)
            return
        cfg.distributed_init_method = "env://"
        cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
        cfg.distributed_rank = int(os.environ["RANK"])
        cfg.device_id = 0
        cfg.distributed_no_spawn = True

    return infer_torch_distributed_launch_init


def prepare_processes_and_input() -> None:
    """Repair the plan of processes just before fairseq follows it.

    Reason: see `mend_processes` and `serve_after_scoring`. All
    commands but fairseq-generate and fairseq-preprocess call `call_main`, which they look up in
    `distributed_utils`.
    """
    replace(distributed_utils, "call_main", _calling)


def _calling(call: Callable) -> Callable:
    def call_main(cfg: Any, main: Callable, **kwargs: Any) -> Any:
        mend_processes(cfg)
        cut_batches_again_each_epoch(cfg)
        serve_after_scoring(main.__globals__)
        return call(cfg, main, **kwargs)

    return call_main


def mend_processes(cfg: Any) -> None:
    """Make the processes of `cfg` ones that can work, or refuse.

    - Under torchrun without --distributed-world-size, each process would train a model of its own,
      all writing to the same folder: torchrun's world size is taken.
    - On CPU, neither NCCL nor DistributedDataParallel with device ids works: gloo, legacy_ddp do.

    Raises:
        ValueError: fairseq would start one process per CUDA device, of which there is none, train
            nothing and report success.
    """
    plan = cfg.distributed_training
    under_torchrun = all(name in os.environ for name in TORCHRUN)
    if under_torchrun and plan.distributed_init_method is None and plan.distributed_world_size == 1:
        plan.distributed_world_size = int(os.environ["WORLD_SIZE"])
    if plan.distributed_world_size <= 1:
        return
    starts_itself = not plan.distributed_no_spawn and not (
        under_torchrun and plan.distributed_init_method is None
    )
    if starts_itself and torch.cuda.device_count() == 0 and "SLURM_JOB_ID" not in os.environ:
        size = plan.distributed_world_size
        raise ValueError(
            f"`--distributed-world-size` {size} starts one process for each CUDA device, but there "
            "is none, so nothing would be trained. Start the processes with torchrun: "
            f"torchrun --nproc-per-node {size} -m fairseq_cli.train ..., with the same arguments."
        )
    if cfg.common.cpu or not torch.cuda.is_available():
        _change(plan, "distributed_backend", "nccl", "gloo")
        for backend in ("pytorch_ddp", "c10d"):
            _change(plan, "ddp_backend", backend, "legacy_ddp")


def _change(plan: Any, name: str, unfit: str, fit: str) -> None:
    if plan[name] == unfit:
        logger.info("--%s %s does not work on CPU: using %s", name.replace("_", "-"), unfit, fit)
        plan[name] = fit
