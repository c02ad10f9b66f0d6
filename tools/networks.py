"""Networks of this project's architectures, without memory for them: what tools count in them."""

from __future__ import annotations

import argparse
import difflib
import logging
import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from nmt_moe.nn import GNMTConfig, GNMTDecoder, GNMTEncoder, LSTMLanguageModel, LSTMLMConfig

# The benchmark's words; GNMT's 32K wordpieces.
VOCABULARY = {LSTMLMConfig: 793_471, GNMTConfig: 32_000}


def build_networks(config: LSTMLMConfig | GNMTConfig, vocab_size: int) -> list[nn.Module]:
    """Build all but the softmax layer, without memory for it."""
    with torch.device("meta"):
        embedding = nn.Embedding(vocab_size, config.model_dim)
        if isinstance(config, LSTMLMConfig):
            return [LSTMLanguageModel(config, embedding)]
        return [GNMTEncoder(config, embedding), GNMTDecoder(config, embedding)]


def kind_of(name: str) -> str:
    """Tell what a parameter belongs to."""
    if "bias_ih" in name:
        return "LSTM bias"
    if "bias" in name or "threshold" in name:
        return "other"
    if ".gate." in name:
        return "gates"
    if ".experts." in name or ".products." in name:
        return "experts"
    return "attention" if "attention" in name else "LSTM"


def active_share(name: str, config: LSTMLMConfig | GNMTConfig) -> float:
    """Tell what share of a parameter one token is multiplied with."""
    moe = config.moe
    if moe is None or moe.gate == "softmax":
        return 1.0
    if ".secondary." in name:
        return moe.top_k / moe.num_groups
    if ".experts." in name:
        return (moe.top_k**2 if moe.num_groups else moe.top_k) / moe.num_experts
    return 1.0


def factored_numbers(network: nn.Module) -> int:
    """Count the rows and columns of all expert matrices."""
    shapes = [p.shape for name, p in network.named_parameters() if ".experts." in name]
    return sum(prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes)


def expert_numbers(networks: Sequence[nn.Module]) -> int:
    """Count the weights of all experts."""
    return sum(
        parameter.numel()
        for network in networks
        for name, parameter in network.named_parameters()
        if ".experts." in name
    )


def find_options() -> dict[str, tuple[type, argparse.Namespace]]:
    """Give the options of every architecture that this project registers with fairseq.

    Returns:
        By name, the model's dataclass of options and what the architecture sets of them.
    """
    logging.disable(logging.INFO)  # fairseq talks while it is imported
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


def find_configs() -> dict[str, LSTMLMConfig | GNMTConfig]:
    """Give the sizes of every architecture that this project registers with fairseq."""
    return {name: make_config(*options) for name, options in find_options().items()}


def make_config(options: Any, args: argparse.Namespace) -> LSTMLMConfig | GNMTConfig:
    """Turn the options of a model into its sizes.

    Raises:
        ValueError: naming the option, its rule and its value.
    """
    return options(**vars(args)).to_config()


def choose(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: naming it and the closest that are, or all.
    """
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)
            advice = f"Close to it: {', '.join(close)}." if close else f"Known: {', '.join(known)}."
            raise ValueError(
                f"`--arch` must be an architecture of this project, but is '{name}'. {advice}"
            )


def lay_out(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows
    )
