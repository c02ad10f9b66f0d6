"""Give stand-in batches to ranks that have run out of batches, to keep all ranks in lockstep."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nmt_moe.moe import MoELayer
from nmt_moe.trainer.experts import moe_layers


class StandIn:
    """A switch for batches that count for nothing: no expert, statistic, loss or log entry changes.

    If one of several ranks has run out of batches, fairseq repeats an earlier batch on it, but then
    drops that rank's whole update from the sample size and the log. With --update-freq, the
    rank's real batches are also dropped from both, although their gradients are kept.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        self.model, self.criterion = model, criterion
        self.handles: list[RemovableHandle] = []

    def switch(self, is_on: bool) -> None:
        """Make batches count for nothing from now on, or make them count again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if is_on:
            self.handles = [
                layer.register_forward_pre_hook(_mask_tokens) for layer in moe_layers(self.model)
            ]
            self.handles.append(self.criterion.register_forward_hook(_count_nothing))


def _mask_tokens(_: MoELayer, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the layer's arguments, (x, mask, ...), with every token masked as padding."""
    x = arguments[0]
    return x, torch.ones(len(x), dtype=torch.bool, device=x.device), *arguments[2:]


def _count_nothing(
    _: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, Any, dict[str, Any]]
) -> tuple[Tensor, Any, dict[str, Any]]:
    """Set the loss, the sample size and the log to 0."""
    loss, sample_size, log = output
    return loss * 0, sample_size * 0, {key: value * 0 for key, value in log.items()}
