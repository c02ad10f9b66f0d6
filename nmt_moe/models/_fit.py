"""Check that a checkpoint's parameters match the model that its configuration describes."""

from copy import deepcopy
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from nmt_moe.checkpoints.files import COPY_AGAIN

Shapes = dict[str, tuple[int, ...]]

# Suffixes of settings that are sizes, and the largest size that is always allowed.
SIZES = ("_layers", "_dim", "num_experts", "num_groups")
LARGEST_SIZE = 2**17
# Parameters with one row for each symbol of the source or target dictionary.
SIZED_BY_SOURCE = ("encoder.network.embedding.weight", "decoder.network.embedding.weight")
SIZED_BY_TARGET = ("decoder.network.embedding.weight", "decoder.output.weight")


def check_size(path: str, state: dict[str, Any]) -> None:
    """Reject a checkpoint if its configuration describes a much larger model than it contains.

    The model is built before its weights are loaded, so a forged configuration with 10^9 experts
    would need as many gigabytes.

    Args:
        path: Path of the checkpoint.
        state: Contents of the checkpoint, with all experts.

    Raises:
        ValueError: if the configuration describes too large a model. The message names the setting
            that is too large, or gives both sizes.
    """
    cfg = _configuration(state)
    have = _shapes(state)
    largest = max([LARGEST_SIZE, *(size for shape in have.values() for size in shape)])
    # In a plain container, a missing option is "???", and reading it raises no error.
    settings: Any = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else vars(cfg)
    for key, value in settings.items():
        # Each layer has parameters, so there cannot be more layers than parameters. Without this
        # limit, it would take hours to reject millions of layers.
        most = len(have) if str(key).endswith("_layers") else largest
        if isinstance(value, int) and str(key).endswith(SIZES) and value > most:
            raise ValueError(
                f"`{path}` has {len(have)} parameters of up to {largest} rows, but its "
                f"configuration sets `{key}` to {value}. {COPY_AGAIN}"
            )
    if _is_ours(cfg):
        values = sum(map(prod, have.values()))
        claimed = sum(map(prod, _shapes_of_model(cfg, have).values()))
        if claimed > 2 * values + LARGEST_SIZE:
            raise ValueError(
                f"`{path}` contains {values} values, but its configuration describes a model with "
                f"{claimed}. {COPY_AGAIN}"
            )


def check_fits_its_model(path: str) -> str | None:
    """Read a checkpoint as every command does, and compare it with its model.

    Returns:
        The model's name; None for one of fairseq's own models, which is not compared.

    Raises:
        ValueError: if parameters are missing, unexpected or of another shape. The message names
            them.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    cfg = _configuration(state)
    if not getattr(cfg, "_name", None):
        raise ValueError(f"`{path}` has no model configuration. Specify another checkpoint.")
    if not _is_ours(cfg):
        return None
    have = _shapes(state)
    want = _shapes_of_model(cfg, have)
    faults = [f"{name} is missing" for name in want.keys() - have.keys()]
    faults += [f"{name} is not one of its parameters" for name in have.keys() - want.keys()]
    faults += [
        f"{name} is {have[name]}, not {want[name]}"
        for name in want.keys() & have.keys()
        if have[name] != want[name]
    ]
    if faults:
        raise ValueError(
            f"`{path}` does not match the model `{cfg._name}` of its configuration: "
            f"{'; '.join(sorted(faults)[:3])}. {COPY_AGAIN}"
        )
    return cfg._name


def _configuration(state: dict[str, Any]) -> Any:
    return (state.get("cfg") or {}).get("model") or SimpleNamespace()


def _is_ours(cfg: Any) -> bool:
    name = getattr(cfg, "_name", None)
    found = models.ARCH_MODEL_REGISTRY.get(name) or models.MODEL_REGISTRY.get(name)
    return found is not None and found.__module__.startswith("nmt_moe.")


def _shapes(state: dict[str, Any]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state["model"].items()}


def _shapes_of_model(cfg: Any, have: Shapes) -> Shapes:
    """Return the parameter shapes of the configured model with the checkpoint's dictionaries."""
    source, target = _stand_in(have, SIZED_BY_SOURCE), _stand_in(have, SIZED_BY_TARGET)
    task = SimpleNamespace(source_dictionary=source, target_dictionary=target)
    # Building this model draws random numbers, but must not change the numbers that a search draws
    # later.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = models.build_model(deepcopy(cfg), task, from_checkpoint=True)
    return _shapes({"model": model.state_dict()})


def _stand_in(shapes: Shapes, names: tuple[str, ...]) -> Dictionary:
    """Return a dictionary with as many symbols as the first of `names` in `shapes` has rows."""
    sizes: list[Any] = [shapes[name] for name in names if shapes.get(name)]
    dictionary = Dictionary()
    for number in range(len(dictionary), sizes[0][0] if sizes else 0):
        dictionary.add_symbol(f"symbol{number}")
    return dictionary
