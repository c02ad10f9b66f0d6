"""Read checkpoints that still use the option names of version 0.1.0."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, Dict

from fairseq import checkpoint_utils
from omegaconf import open_dict

from nmt_moe.checkpoints.network import EARLY_NAMES
from nmt_moe.compat._replace import replace


def rename_early_options(model: Any) -> None:
    """Rename the options of a checkpoint's model to their present names.

    fairseq drops options that the model does not know, so the defaults would silently replace
    options with early names. The options of other models are left unchanged.
    """
    if isinstance(model, Namespace):
        model = vars(model)
    if not EARLY_NAMES.keys() <= (model or {}).keys():
        return
    for early, name in EARLY_NAMES.items():
        model[name] = model.pop(early)


def accept_early_options() -> None:
    """Make fairseq rename the options of every checkpoint that it reads."""
    replace(checkpoint_utils, "_upgrade_state_dict", _upgrading)


def _upgrading(upgrade: Callable) -> Callable:
    def upgrade_state_dict(state: Dict[str, Any]) -> Dict[str, Any]:
        cfg = state.get("cfg")
        if cfg is not None and "model" in cfg:
            with open_dict(cfg):
                rename_early_options(cfg["model"])
        return upgrade(state)

    return upgrade_state_dict
