"""Read checkpoints whose options have the names of version 0.1.0."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, Dict

from fairseq import checkpoint_utils
from omegaconf import open_dict

from nmt_moe.compat._replace import replace
from nmt_moe.models._options import MoEOptions


def early_names() -> Dict[str, str]:
    """Return each option's early name, which its alias on the command line keeps, and its name."""
    aliases = {
        option.metadata["argparse_alias"]: name
        for name, option in MoEOptions.__dataclass_fields__.items()
        if "argparse_alias" in option.metadata
    }
    return {alias.lstrip("-").replace("-", "_"): name for alias, name in aliases.items()}


def rename_early_options(model: Any) -> None:
    """Give the options of a checkpoint's model their present names.

    fairseq drops options that the model does not know, so that early ones would silently become
    the defaults. The options of other models are left as they are.
    """
    names = early_names()
    if isinstance(model, Namespace):
        model = vars(model)
    if not names.keys() <= (model or {}).keys():
        return
    for early, name in names.items():
        model[name] = model.pop(early)


def accept_early_options() -> None:
    """Rename the options of every checkpoint that fairseq reads."""
    replace(checkpoint_utils, "_upgrade_state_dict", _upgrading)


def _upgrading(upgrade: Callable) -> Callable:
    def upgrade_state_dict(state: Dict[str, Any]) -> Dict[str, Any]:
        cfg = state.get("cfg")
        if cfg is not None and "model" in cfg:
            with open_dict(cfg):
                rename_early_options(cfg["model"])
        return upgrade(state)

    return upgrade_state_dict
