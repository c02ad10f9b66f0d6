"""Find the architectures that this project registers with fairseq."""

from __future__ import annotations

import argparse
import difflib
import logging
import warnings
from collections.abc import Sequence
from typing import Any

from nmt_moe.nn import GNMTConfig, LSTMLMConfig

NetworkConfig = LSTMLMConfig | GNMTConfig
# Default vocabulary sizes: the words of the language-model benchmark, and GNMT's 32K wordpieces.
VOCABULARY = {LSTMLMConfig: 793_471, GNMTConfig: 32_000}


def find_options() -> dict[str, tuple[type, argparse.Namespace]]:
    """Return, for each architecture, its model's options class and the options that it sets."""
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
    """Return the network configuration of every architecture, by name."""
    return {name: make_config(*options) for name, options in find_options().items()}


def make_config(options: Any, args: argparse.Namespace) -> NetworkConfig:
    """Build a network configuration from a model's options.

    Args:
        options: Dataclass of the model's options.
        args: Values of options; the other options have their defaults.

    Raises:
        ValueError: if a value is not allowed. The message gives the option, the constraint and
            the value.
    """
    return options(**vars(args)).to_config()


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Reject names of unknown architectures.

    Raises:
        ValueError: if a name is unknown. The message names it and similar names, or all known ones.
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
