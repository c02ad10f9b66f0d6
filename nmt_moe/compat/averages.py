"""Make --store-ema work for models whose state contains integers."""

from collections.abc import Callable
from typing import Any

from fairseq.models.ema.ema import EMA
from torch import nn

from nmt_moe.compat._replace import replace


def copy_integers_into_averages() -> None:
    """Copy the integers of a model into its moving average instead of averaging them.

    Reason: averaging an integer, such as the digest of a dictionary, raises the error "result type
    Float can't be cast to Long".
    """
    replace(EMA, "__init__", _starting)


def _starting(init: Callable) -> Callable:
    def start(self: EMA, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, model, *args, **kwargs)
        state = model.state_dict()
        integers = {name for name, value in state.items() if not value.is_floating_point()}
        self.skip_keys = self.skip_keys | integers

    return start
