"""The architectures that this project registers with fairseq, by name."""

from __future__ import annotations

import argparse
import difflib
import logging
import warnings
from collections.abc import Sequence
from typing import Any

from nmt_moe.nn import GNMTConfig, LSTMLMConfig

NetworkConfig = LSTMLMConfig | GNMTConfig
# The words of the language-model benchmark; GNMT's 32K wordpieces.
VOCABULARY = {LSTMLMConfig: 793_471, GNMTConfig: 32_000}


def find_options() -> dict[str, tuple[type, argparse.Namespace]]:
    """Return, by architecture, the model's dataclass of options and the options it sets."""
    logging.disable(logging.INFO)  # fairseq logs while it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fairseq import models

        from nmt_moe import plugin

        plugin.register()
    found = {}
    for name, model in models.ARCH_MODEL_REGISTRY.items():
        if model.__module__.startswith("nmt_moe."):
            args = argparse.Namespace()
            models.ARCH_CONFIG_REGISTRY[name](args)
            options = models.MODEL_DATACLASS_REGISTRY[models.ARCH_MODEL_NAME_REGISTRY[name]]
            found[name] = options, args
    return found


def find_configs() -> dict[str, NetworkConfig]:
    """Return the sizes of every architecture."""
    return {name: make_config(*options) for name, options in find_options().items()}


def make_config(options: Any, args: argparse.Namespace) -> NetworkConfig:
    """Build the sizes of a model from its options.

    Raises:
        ValueError: naming the option, its rule and its value.
    """
    return options(**vars(args)).to_config()


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Reject a name that is not known.

    Raises:
        ValueError: naming it and the closest known names, or all names.
    """
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)
            advice = (
                f"Similar names: {', '.join(close)}."
                if close
                else f"Known names: {', '.join(known)}."
            )
            raise ValueError(
                f"`--arch` must be an architecture of this project, but is '{name}'. {advice}"
            )
