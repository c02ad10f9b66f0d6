"""Whether a checkpoint's parameters are those of the model that its configuration describes."""

from types import SimpleNamespace
from typing import Any

import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary

# Parameters with a row for each symbol of the source's and the target's dictionary.
SIZED_BY_SOURCE = ("encoder.network.embedding.weight", "decoder.network.embedding.weight")
SIZED_BY_TARGET = ("decoder.network.embedding.weight", "decoder.output.weight")


def check_fits_its_model(path: str) -> str | None:
    """Read a checkpoint as every command does, and compare it with the model it is for.

    Returns:
        The model's name; None for a model of fairseq, whose parameters are not compared.

    Raises:
        ValueError: naming the parameters that are missing, unexpected or of another shape.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    cfg: Any = (state.get("cfg") or {}).get("model")
    if not getattr(cfg, "_name", None):
        raise ValueError(f"`{path}` has no configuration of a model. Name another checkpoint.")
    found = models.ARCH_MODEL_REGISTRY.get(cfg._name) or models.MODEL_REGISTRY[cfg._name]
    if not found.__module__.startswith("nmt_moe."):
        return None
    have = {name: tuple(value.shape) for name, value in state["model"].items()}
    for key in ("encoder_layers", "decoder_layers", "lstm_layers", "expert_layers"):
        # Each layer has parameters: a claim of millions must not cost hours to refute.
        if getattr(cfg, key, 0) > len(have):
            raise ValueError(f"`{path}` has {len(have)} parameters, but `{key}` {cfg[key]}.")
    source, target = _stand_in(have, SIZED_BY_SOURCE), _stand_in(have, SIZED_BY_TARGET)
    task = SimpleNamespace(source_dictionary=source, target_dictionary=target)
    with torch.device("meta"):
        model = models.build_model(cfg, task, from_checkpoint=True)
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    faults = [f"{name} is missing" for name in want.keys() - have.keys()]
    faults += [f"{name} is not a parameter of it" for name in have.keys() - want.keys()]
    faults += [
        f"{name} is {have[name]}, not {want[name]}"
        for name in want.keys() & have.keys()
        if have[name] != want[name]
    ]
    if faults:
        raise ValueError(
            f"`{path}` does not fit the model `{cfg._name}` of its configuration: "
            f"{'; '.join(sorted(faults)[:3])}. Copy it again, or name another checkpoint."
        )
    return cfg._name


def _stand_in(shapes: dict[str, tuple[int, ...]], names: tuple[str, ...]) -> Dictionary:
    """Return a dictionary with as many symbols as the first of the parameters has rows."""
    sizes: list[Any] = [shapes[name] for name in names if shapes.get(name)]
    dictionary = Dictionary()
    for number in range(len(dictionary), sizes[0][0] if sizes else 0):
        dictionary.add_symbol(f"symbol{number}")
    return dictionary
