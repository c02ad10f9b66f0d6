"""Make --bf16 and --fp16 work on a GPU without XLA, and on a CPU."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fairseq import options
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from nmt_moe.compat._replace import replace


def fix_half_precision_flags() -> None:
    """Correct the half-precision flags after they are parsed.

    Reason: `parse_args_and_arch` assumes a TPU for every --bf16, and --fp16 flattens gradients on
    the current CUDA device, which a CPU-only torch does not have. All commands look up this
    function in `options` after --user-dir is imported.
    """
    replace(options, "parse_args_and_arch", _parsing)


def _parsing(parse: Callable) -> Callable:
    def parse_args_and_arch(*positional: Any, **keywords: Any) -> Any:
        try:
            result = parse(*positional, **keywords)
        except ValueError as error:
            if "Cannot combine --fp16 and --tpu" not in str(error):
                raise
            message = "`--fp16` and `--bf16` (or `--tpu`) cannot be combined. Choose one."
            raise ValueError(message) from error
        fix_flags(result[0] if isinstance(result, tuple) else result)
        return result

    return parse_args_and_arch


def fix_flags(args: Namespace) -> None:
    """Use bf16 without a TPU, and do not flatten fp16 gradients on a CPU."""
    if getattr(args, "bf16", False) and distributed_utils.xm is None:
        args.tpu = False
    on_cpu = getattr(args, "cpu", False) or not torch.cuda.is_available()
    if getattr(args, "fp16", False) and on_cpu and hasattr(args, "fp16_no_flatten_grads"):
        args.fp16_no_flatten_grads = True


def skip_overflowing_updates_on_cpu() -> None:
    """Skip overflowing updates of --fp16 on a CPU, as on a GPU.

    Reason: for such updates, the trainer sets the gradient norm to `torch.tensor(0.0).cuda()`,
    which fails without a CUDA device.
    """
    replace(Trainer, "train_step", _overflowing)


def _overflowing(step: Callable) -> Callable:
    def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.cuda or not self.cfg.common.fp16:
            return step(self, *args, **kwargs)
        with _staying_on_cpu():
            return step(self, *args, **kwargs)

    return train_step


@contextmanager
def _staying_on_cpu() -> Iterator[None]:
    move = torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = move  # type: ignore[method-assign]
