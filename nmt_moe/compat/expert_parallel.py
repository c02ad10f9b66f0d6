"""Train with experts spread over processes: what fairseq's trainer does not do by itself."""

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from torch import Tensor, nn

from nmt_moe.compat._replace import replace
from nmt_moe.compat.precision import overflowing_on_cpu
from nmt_moe.moe import MoELayer, ShardedExperts
from nmt_moe.parallel import ExpertParallelGroup, average_shard_gradients, shard_norm

logger = logging.getLogger(__name__)


def spread_experts_over_processes() -> None:
    """Let fairseq's trainer train a model whose experts are spread over its processes.

    Reasons: it leaves gradients of experts as they are, which is the number of processes too much;
    clips by the norm of all others; flattens --fp16's gradients, experts and others together;
    repeats a batch that did not fit into memory while the other processes wait; counts in the
    balance of experts a batch that only stands in for a missing one (which it does in any training
    in several processes); and sums up a buffer with room for the experts' gradients, all of which
    is sent. And translations of --eval-bleu end after other numbers of steps in each process.
    """
    replace(Trainer, "__init__", _starting)
    replace(Trainer, "_prepare_sample", _preparing)
    replace(
        Trainer, "train_step", lambda step: _stopping_where_memory_ends(overflowing_on_cpu(step))
    )
    replace(Trainer, "valid_step", _stopping_where_memory_ends)
    replace(Trainer, "clip_grad_norm", _clipping)
    replace(LegacyDistributedDataParallel, "__init__", _fitting_buffer)
    replace(LegacyDistributedDataParallel, "all_reduce_grads", _averaging)
    replace(FairseqTask, "inference_step", _searching)


def moe_layers(model: nn.Module) -> Iterator[MoELayer]:
    """Yield the MoE layers of a model."""
    return (module for module in model.modules() if isinstance(module, MoELayer))


def expert_group(model: nn.Module) -> ExpertParallelGroup | None:
    """Return the processes that the experts of a model are spread over; None if they are not."""
    groups = (layer.group for layer in moe_layers(model) if layer.group.size > 1)
    return next(groups, None)


def _starting(init: Callable) -> Callable:
    def start(self: Trainer, cfg: Any, task: Any, model: nn.Module, *args: Any, **kw: Any) -> None:
        group = expert_group(model)
        if group is not None:
            check_settings(cfg, group.size)
            if cfg.common.fp16 and not cfg.common.fp16_no_flatten_grads:
                logger.info("experts are spread over processes: using --fp16-no-flatten-grads")
                cfg.common.fp16_no_flatten_grads = True
        init(self, cfg, task, model, *args, **kw)
        self.stands_in = False
        for layer in moe_layers(model):
            layer.register_forward_pre_hook(partial(_masking, self))

    return start


def check_settings(cfg: Any, size: int) -> None:
    """Refuse what cannot work where `size` processes share the experts.

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


def _preparing(prepare: Callable) -> Callable:
    def _prepare_sample(self: Trainer, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
        sample, self.stands_in = prepare(self, sample, is_dummy)
        return sample, self.stands_in

    return _prepare_sample


def _masking(trainer: Trainer, _: MoELayer, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Take every token of a batch that stands in for a missing one for padding: (x, mask, ...).

    The other processes need not wait, and it reaches no loss and no statistic.
    """
    if not trainer.stands_in:
        return None
    x = arguments[0]
    return x, torch.ones(len(x), dtype=torch.bool, device=x.device), *arguments[2:]


def _stopping_where_memory_ends(step: Callable) -> Callable:
    def step_or_stop(self: Trainer, samples: Any, raise_oom: bool = False) -> Any:
        return step(self, samples, raise_oom or expert_group(self.get_model()) is not None)

    return step_or_stop


def _clipping(clip: Callable) -> Callable:
    def clip_grad_norm(self: Trainer, clip_norm: float) -> Tensor:
        group = expert_group(self.get_model())
        if group is None:
            return clip(self, clip_norm)

        def add_experts(dense_norm: Tensor) -> Tensor:
            # Of half-precision models, the fp32 copies, to which fairseq copies its mark.
            gradients = [p.grad for p in self.optimizer.params if hasattr(p, "expert")]
            return torch.hypot(dense_norm, shard_norm(gradients, group).to(dense_norm))

        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=add_experts)

    return clip_grad_norm


def _fitting_buffer(init: Callable) -> Callable:
    def start(self: LegacyDistributedDataParallel, *args: Any, **kw: Any) -> None:
        init(self, *args, **kw)
        # What goes through the buffer: neither experts nor what is larger and sent by itself.
        counts = [p.numel() for p in self.module.parameters() if not hasattr(p, "expert")]
        used = sum(count for count in counts if count <= self.buffer_size)
        self.buffer_size = max(min(self.buffer_size, used), 1)

    return start


def _averaging(reduce: Callable) -> Callable:
    def all_reduce_grads(self: LegacyDistributedDataParallel) -> None:
        reduce(self)
        if not self.accumulate_grads:
            average_shard_gradients(self.module.parameters())

    return all_reduce_grads


def _searching(search: Callable) -> Callable:
    def inference_step(
        self: Any, generator: Any, models: list[nn.Module], *args: Any, **kw: Any
    ) -> Any:
        result = search(self, generator, models, *args, **kw)
        serve_others(models)
        return result

    return inference_step


def serve_others(models: list[nn.Module]) -> None:
    """Answer the other processes' tokens until all have called this."""
    for model in models:
        # All processes encode once; after that only the decoder's layer is called.
        for layer in moe_layers(getattr(model, "decoder", model)):
            if isinstance(layer.experts, ShardedExperts):
                layer.experts.serve()


def serve_after_scoring(namespace: dict[str, Any]) -> None:
    """Replace `eval_lm` in the namespace of `fairseq_cli.eval_lm.main`.

    Reason: a process that has no batches left would end while the others wait for its experts.
    Other commands' namespaces lack the name. Under `python -m` the module is called `__main__`.
    """
    if "eval_lm" in namespace:
        replace(sys.modules[namespace["__name__"]], "eval_lm", _scoring)


def _scoring(score: Callable) -> Callable:
    def eval_lm(models: list[nn.Module], *args: Any, **kw: Any) -> Any:
        result = score(models, *args, **kw)
        serve_others(models)
        return result

    return eval_lm
