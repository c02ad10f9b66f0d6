"""Settings of a training that cannot work are rejected before its first update."""

from typing import Any


def check_expert_parallel(cfg: Any, size: int) -> None:
    """Reject what cannot work where `size` processes share the experts.

    Raises:
        ValueError: naming the option, the reason and the way out.
    """
    plan = cfg.distributed_training
    spread = f"where {size} processes share the experts"
    way_out = "`--expert-parallel-size 1` (each process has all experts)"
    if plan.ddp_backend not in ("legacy_ddp", "no_c10d"):
        raise ValueError(
            f"`--ddp-backend` must be legacy_ddp {spread}, but is {plan.ddp_backend}, which would "
            f"average different experts together. Use `--ddp-backend legacy_ddp` or {way_out}."
        )
    optimizer = getattr(cfg.optimizer, "_name", None)
    refused = {
        "--amp": (cfg.common.amp, "each process would skip updates by itself"),
        "--use-bmuf": (cfg.optimization.use_bmuf, "it averages different experts together"),
        "--zero-sharding": (plan.zero_sharding != "none", "it spreads the optimizer another way"),
        "--store-ema": (cfg.ema.store_ema, "the averages of experts would not be saved"),
        "--optimizer composite": (optimizer == "composite", "its state would not be saved"),
        "--write-checkpoints-asynchronously": (
            cfg.checkpoint.write_checkpoints_asynchronously,
            "files of experts are deleted once no checkpoint needs them",
        ),
        "--model-parallel-size": (cfg.common.model_parallel_size > 1, "it spreads the model too"),
    }
    for option, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(
                f"`{option}` cannot be used {spread}: {reason}. Leave it out or use {way_out}."
            )
