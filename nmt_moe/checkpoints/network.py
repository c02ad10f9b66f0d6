"""Read the kind, configuration and parameters of the network in a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from nmt_moe.checkpoints.files import shown
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, LSTMLMConfig

Config = TypeVar("Config")

# Maps the names that options had in version 0.1.0 to their present names.
EARLY_NAMES = {
    "moe_top_k": "top_k",
    "expert_hidden_dim": "hidden_dim",
    "expert_recompute": "recompute",
    "moe_gate": "gate",
    "moe_groups": "num_groups",
    "importance_loss_weight": "importance_weight",
    "load_loss_weight": "load_weight",
}

# Options that earlier checkpoints lack.
LATER_NAMES = {"decoder_num_experts"}


@dataclass(frozen=True)
class SavedNetwork:
    """A network that a checkpoint describes.

    Attributes:
        architecture: Name of the architecture in fairseq, such as `lstm_moe_gnmt_small`.
        config: Configuration of the network: a `GNMTConfig` for a translation model, an
            `LSTMLMConfig` for a language model.
        parameters: Maps names in `nmt_moe.nn`, prefixed with `encoder.` or `decoder.`, to
            parameters.
    """

    architecture: str
    config: GNMTConfig | LSTMLMConfig
    parameters: dict[str, Tensor]


def read_network(path: Path, state: Mapping[str, Any]) -> SavedNetwork:
    """Read a checkpoint's description of its network.

    Args:
        path: Path of the checkpoint, for error messages.
        state: Contents of the checkpoint, with all experts.

    Raises:
        ValueError: if the checkpoint contains another kind of model or an invalid configuration.
    """
    cfg = state.get("cfg")
    options = _as_dict(cfg.get("model")) if isinstance(cfg, Mapping) else {}
    architecture = options.get("_name") or options.get("arch")
    for early, name in EARLY_NAMES.items():
        if early in options:
            options[name] = options.pop(early)
    parameters = {
        name.replace(".network.", ".", 1): value
        for name, value in state["model"].items()
        if not name.endswith("dictionary_check.digest")
    }
    kind: type[GNMTConfig | LSTMLMConfig] = (
        GNMTConfig if "encoder_layers" in options else LSTMLMConfig
    )
    needed = {field.name for field in fields(kind)} - {"moe", *LATER_NAMES}
    if not isinstance(architecture, str) or not needed <= options.keys():
        raise ValueError(
            f"`{path}` contains the model {shown(architecture)}, which is not one of this "
            "project's models. Name a checkpoint that was trained with `--arch lstm_moe_gnmt`, "
            "`lstm_moe_lm` or one of their variants."
        )
    try:
        moe = None if options.get("dense") else _pick(MoEConfig, options)
        config = _pick(kind, options, moe=moe)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{path}` has an invalid configuration: {error}") from error
    return SavedNetwork(architecture, config, parameters)


def _as_dict(options: Any) -> dict[str, Any]:
    if isinstance(options, argparse.Namespace):
        return dict(vars(options))
    return dict(options) if isinstance(options, Mapping) else {}


def _pick(kind: type[Config], options: Mapping[str, Any], **others: Any) -> Config:
    names = [f.name for f in fields(kind) if f.name not in others]  # type: ignore[arg-type]
    return kind(**{name: options[name] for name in names if name in options}, **others)
