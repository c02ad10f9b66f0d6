"""Store the weights of a bundle."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nmt_moe.inference.bundle import WEIGHTS, BundleConfig
from nmt_moe.inference.weights import (
    DIGEST,
    EXPERTS_IN,
    SCALE,
    UNUSED,
    expert_digest,
    experts_file,
    is_product,
)
from nmt_moe.kernels import quantise_rows

ALIGNMENT = 64  # weights start at multiples of this many bytes, the size of a cache line


def write_weights(folder: Path, config: BundleConfig, parameters: dict[str, Tensor]) -> None:
    """Write all weights of a network.

    Args:
        folder: Folder of the bundle.
        config: Configuration of the bundle.
        parameters: Parameters by their names in `SavedNetwork`.
    """
    experts: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    for name, value in parameters.items():
        side, _, rest = name.partition(".moe.moe.experts.")
        if rest:
            # Store one row for each output, because products are computed in this layout.
            experts.setdefault(side, {})[rest] = value.float().mT
        elif name not in config.shared_weights and UNUSED not in name:
            dense |= store(name, value.float(), config.dtype)
    save_tensors(folder / WEIGHTS, dense)
    for side, values in experts.items():
        stored: dict[str, Tensor] = {}
        for name, value in values.items():
            stored |= store(name, value, config.dtype)
        save_experts(folder / experts_file(side), stored)


def store(name: str, value: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return a weight as a bundle stores it, with its scales."""
    if not is_product(name, value) or dtype == "float32":
        return {name: value.contiguous()}
    if dtype == "bfloat16":
        return {name: value.bfloat16().contiguous()}
    quantised, scale = quantise_rows(value.contiguous())
    return {name: quantised, name + SCALE: scale}


def save_experts(path: Path, stored: dict[str, Tensor]) -> None:
    """Write the experts of a layer, and a digest of each.

    Args:
        path: Path of the file.
        stored: (E, ...) tensors from `store`.
    """
    digests = [list(expert_digest(number, stored)) for number in range(len(stored[EXPERTS_IN]))]
    save_tensors(path, {**stored, DIGEST: torch.tensor(digests, dtype=torch.uint8)})


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with tensors that start at multiples of `ALIGNMENT` bytes."""
    save_file(tensors, path, {"format": "pt"})
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    # An entry with an empty value adds 9 characters to the header: ,"pad":""
    padding = " " * ((-start - 9) % ALIGNMENT)
    save_file(tensors, path, {"format": "pt", "pad": padding})
