"""Before the first update, reject settings that cannot work."""

import ast
import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from nmt_moe.checks import check_range
from nmt_moe.trainer.experts import moe_layers

logger = logging.getLogger(__name__)


# Smallest and largest values by (group of settings, option), with fairseq's names.
RANGES = {
    ("criterion", "label_smoothing"): (0, 1),
    ("optimizer", "adam_eps"): (0, None),
    ("optimizer", "momentum"): (0, 1),
    ("optimizer", "weight_decay"): (0, None),
    ("optimization", "stop_time_hours"): (0, None),
    ("optimization", "max_epoch"): (0, None),
    ("optimization", "max_update"): (0, None),
    ("dataset", "num_workers"): (0, None),
    ("dataset", "max_tokens"): (1, None),
    ("dataset", "batch_size"): (1, None),
    ("dataset", "max_tokens_valid"): (1, None),
    ("dataset", "batch_size_valid"): (1, None),
    ("dataset", "validate_interval"): (1, None),
    ("dataset", "validate_interval_updates"): (0, None),
    ("checkpoint", "save_interval"): (1, None),
    ("checkpoint", "save_interval_updates"): (0, None),
    ("common", "log_interval"): (1, None),
    ("ema", "ema_decay"): (0, 1),
}


def check_numbers(cfg: Any) -> None:
    """Reject numbers that are out of range but that fairseq would accept.

    Raises:
        ValueError: if a number is out of range; the message names the option, its range and its
            value.
    """
    for group in ("optimization", "optimizer", "lr_scheduler", "criterion", "model", "checkpoint"):
        check_finite_numbers(cfg.get(group) or {})
    check_betas(getattr(cfg.optimizer, "adam_betas", None))
    for (group, name), bounds in RANGES.items():
        value = getattr(cfg.get(group), name, None)
        if value is not None:
            check_range(f"--{name.replace('_', '-')}", value, *bounds)
    for value in cfg.optimization.update_freq:
        check_range("--update-freq", value, 1)


def check_finite_numbers(settings: Any) -> None:
    """Reject infinities and NaN among the settings of one group.

    Raises:
        ValueError: if a number is not finite; the message names the option and its value.
    """
    for name, value in settings.items() if hasattr(settings, "items") else vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"`--{name.replace('_', '-')}` must be a finite number, but is {value}."
            )


def check_betas(betas: Any) -> None:
    """Reject `--adam-betas` that are not two numbers of at least 0 and less than 1.

    Raises:
        ValueError: if the option has another value; the message names the option and its value.
    """
    found = ast.literal_eval(betas) if isinstance(betas, str) else betas
    if found is None:
        return
    is_pair = isinstance(found, Sequence) and len(found) == 2
    if not is_pair or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in found):
        raise ValueError(
            "`--adam-betas` must be two numbers of at least 0 and less than 1, such as "
            f"(0.9, 0.999), but is {betas}."
        )


def check_training(cfg: Any, model: nn.Module, criterion: nn.Module) -> None:
    """Reject settings that defeat the purpose of training.

    Raises:
        ValueError: if a setting is rejected; the message gives the option, the constraint and the
            value.
    """
    settings = cfg.optimization
    for option, values in (("--lr", settings.lr), ("--clip-norm", [settings.clip_norm])):
        for value in values:
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{option}` must be a number of at least 0, but is {value}.")
    check_numbers(cfg)
    layers = list(moe_layers(model))
    weights = [(layer.config.importance_weight, layer.config.load_weight) for layer in layers]
    if any(map(any, weights)) and not getattr(criterion, "adds_balance_losses", False):
        raise ValueError(
            "`--criterion` must be moe_label_smoothed_cross_entropy or, for language models, "
            f"moe_cross_entropy, but is {cfg.criterion._name}, which drops the balance losses of "
            "the model's MoE layers. Use one of the two, or set both weights of the losses to 0."
        )
    for layer in layers:
        config = layer.config
        learns = config.gate == "softmax" or config.top_k > 1 or config.load_weight > 0
        if not learns and not config.num_groups:
            logger.warning(
                "with one expert for each token (top_k is 1), each token's gate is 1, so the gate "
                "of the %s can only learn from the load loss, whose weight is 0. Use more "
                "experts for each token, or set a weight for the load loss.",
                layer.name,
            )


def check_expert_parallel(cfg: Any, size: int) -> None:
    """Reject settings that cannot work if the experts are divided among `size` processes.

    Raises:
        ValueError: if a setting is rejected; the message names the option, the reason and a remedy.
    """
    plan = cfg.distributed_training
    spread = f"where the experts are divided among {size} processes"
    way_out = "`--expert-parallel-size 1` (each process has all experts)"
    if plan.ddp_backend not in ("legacy_ddp", "no_c10d"):
        raise ValueError(
            f"`--ddp-backend` must be legacy_ddp {spread}, but is {plan.ddp_backend}, which would "
            f"average different experts together. Use `--ddp-backend legacy_ddp` or {way_out}."
        )
    optimizer = getattr(cfg.optimizer, "_name", None)
    refused = {
        "--amp": (cfg.common.amp, "processes would skip updates independently"),
        "--use-bmuf": (cfg.optimization.use_bmuf, "it averages different experts together"),
        "--zero-sharding": (
            plan.zero_sharding != "none",
            "it spreads the optimizer in a different way",
        ),
        "--store-ema": (cfg.ema.store_ema, "the averages of experts would not be saved"),
        "--optimizer composite": (optimizer == "composite", "its state would not be saved"),
        "--write-checkpoints-asynchronously": (
            cfg.checkpoint.write_checkpoints_asynchronously,
            "expert files are deleted once no checkpoint needs them",
        ),
        "--model-parallel-size": (cfg.common.model_parallel_size > 1, "it spreads the model too"),
    }
    for option, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(
                f"`{option}` cannot be used {spread}: {reason}. Leave it out or use {way_out}."
            )
