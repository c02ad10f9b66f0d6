"""Save the additional state of --fp16, --bf16 and --amp, so that training resumes exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# State of fairseq's DynamicLossScaler, besides its scale.
COUNTERS = ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")


def master_weights(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the float32 weights that an optimizer trains instead of a model's own weights.

    Args:
        model: The model, in half precision or not.
        optimizer: fairseq's optimizer.

    Returns:
        Weights by their names in the model's state; {} if the optimizer trains the model's own
        weights. A shared parameter appears under each of its names.
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
    """Return each parameter's part of the flat tensors, one for each device."""
    (values,) = flat.values()  # only fairseq's pipelines use several devices
    parts = values.detach().split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


@contextmanager
def keeping_loaded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the weights that the `with` block loads, not yet rounded to the model's dtype."""
    loaded: dict[str, Tensor] = {}
    hook = model.register_load_state_dict_pre_hook(
        lambda _, state, prefix, *__: None if prefix else loaded.update(state)
    )
    try:
        yield loaded
    finally:
        hook.remove()


def set_master_weights(model: nn.Module, optimizer: Any, loaded: dict[str, Tensor]) -> None:
    """Set an optimizer's float32 weights from a checkpoint."""
    with torch.no_grad():
        for name, master in master_weights(model, optimizer).items():
            master.copy_(loaded[name])


def scaler_state(optimizer: Any) -> dict[str, Any]:
    """Return the counters that determine when the loss scale changes, or {} if there is none."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return {}
    if hasattr(scaler, "state_dict"):  # torch's, with --amp
        return scaler.state_dict()
    return {name: getattr(scaler, name) for name in COUNTERS}


def set_scaler_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore the counters that `scaler_state` returned."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not state:
        return
    if hasattr(scaler, "load_state_dict"):
        scaler.load_state_dict(state)
    elif state.keys() == set(COUNTERS):
        vars(scaler).update(state)
