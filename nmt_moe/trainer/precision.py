"""What --fp16, --bf16 and --amp keep beside the model's weights, so that a resume loses nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Of fairseq's DynamicLossScaler, beside its scale.
COUNTERS = ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")


def master_weights(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the float32 weights that an optimizer trains in the place of a model's own.

    Args:
        model: The model, in half precision or not.
        optimizer: fairseq's.

    Returns:
        By the names in the model's state, parameters with two names twice; {} if the optimizer
        trains the model's own weights.
    """
    masters = getattr(optimizer, "fp32_params", None)
    if masters is None:
        return {}
    if isinstance(masters, dict):  # flat: one tensor for each device
        masters = _cut_flat(masters, optimizer.fp16_params)
    own = {id(p): master.detach() for p, master in zip(optimizer.fp16_params, masters, strict=True)}
    named = model.named_parameters(remove_duplicate=False)
    return {name: own[id(p)] for name, p in named if id(p) in own}


def _cut_flat(flat: dict[Any, Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Return the part of each parameter in tensors that hold all of a device."""
    (values,) = flat.values()  # several devices are of fairseq's pipelines only
    parts = values.detach().split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


@contextmanager
def keeping_loaded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the weights that a model is given meanwhile, before they are rounded to its own."""
    loaded: dict[str, Tensor] = {}
    hook = model.register_load_state_dict_pre_hook(
        lambda _, state, prefix, *__: None if prefix else loaded.update(state)
    )
    try:
        yield loaded
    finally:
        hook.remove()


def set_master_weights(model: nn.Module, optimizer: Any, loaded: dict[str, Tensor]) -> None:
    """Give an optimizer the float32 weights of a checkpoint."""
    with torch.no_grad():
        for name, master in master_weights(model, optimizer).items():
            master.copy_(loaded[name])


def scaler_state(optimizer: Any) -> dict[str, Any]:
    """Return when the scale of the loss is changed next; {} if there is none."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return {}
    if hasattr(scaler, "state_dict"):  # torch's, of --amp
        return scaler.state_dict()
    return {name: getattr(scaler, name) for name in COUNTERS}


def set_scaler_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Go on with the scale of the loss as `scaler_state` returned it."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not state:
        return
    if hasattr(scaler, "load_state_dict"):
        scaler.load_state_dict(state)
    elif state.keys() == set(COUNTERS):
        vars(scaler).update(state)
