"""Make torchrun work on the CPU, and reject requests for processes that would never start."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils

from nmt_moe.compat._replace import replace

logger = logging.getLogger(__name__)

# Environment variables that torchrun sets for every process.
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def let_torchrun_train_on_cpu() -> None:
    """Use the rank and world size of torchrun even without a CUDA device.

    Reason: fairseq computes `rank % cuda.device_count()`, which divides by zero.
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


def fix_distributed_config() -> None:
    """Correct the options for processes just before fairseq uses them.

    Reason: see the functions that take `plan`. All commands except fairseq-generate and
    fairseq-preprocess call `call_main`, which they look up in `distributed_utils`.
    """
    replace(distributed_utils, "call_main", _fixing)


def _fixing(call: Callable) -> Callable:
    def call_main(cfg: Any, main: Callable, **kwargs: Any) -> Any:
        plan = cfg.distributed_training
        take_world_size_of_torchrun(plan)
        if plan.distributed_world_size > 1:
            check_processes_start(plan)
            if cfg.common.cpu or not torch.cuda.is_available():
                choose_backends_of_cpu(plan)
        return call(cfg, main, **kwargs)

    return call_main


def is_under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN)


def take_world_size_of_torchrun(plan: Any) -> None:
    """Use torchrun's world size if --distributed-world-size is not set.

    Otherwise, each process would train its own model, and all would write to the same folder.
    """
    if (
        is_under_torchrun()
        and plan.distributed_init_method is None
        and plan.distributed_world_size == 1
    ):
        plan.distributed_world_size = int(os.environ["WORLD_SIZE"])


def check_processes_start(plan: Any) -> None:
    """Reject requests for processes that fairseq would never start.

    Raises:
        ValueError: if fairseq would start one process for each CUDA device but there is none. It
            would then report success without training anything.
    """
    starts_itself = not plan.distributed_no_spawn and not (
        is_under_torchrun() and plan.distributed_init_method is None
    )
    if starts_itself and torch.cuda.device_count() == 0 and "SLURM_JOB_ID" not in os.environ:
        size = plan.distributed_world_size
        raise ValueError(
            f"`--distributed-world-size` {size} starts one process for each CUDA device, but there "
            "is none, so nothing would be trained. Start the processes with torchrun: "
            f"torchrun --nproc-per-node {size} -m fairseq_cli.train ..., with the same arguments."
        )


def choose_backends_of_cpu(plan: Any) -> None:
    """Use gloo and legacy_ddp, because NCCL and torch's DDP with device ids need a GPU."""
    _change(plan, "distributed_backend", "nccl", "gloo")
    for backend in ("pytorch_ddp", "c10d"):
        _change(plan, "ddp_backend", backend, "legacy_ddp")


def _change(plan: Any, name: str, unfit: str, fit: str) -> None:
    if plan[name] == unfit:
        logger.info("--%s %s does not work on CPU: using %s", name.replace("_", "-"), unfit, fit)
        plan[name] = fit
