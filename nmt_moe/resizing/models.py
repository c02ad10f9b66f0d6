"""Read checkpoints and bundles to change their experts, and write the results."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from nmt_moe.checkpoints import load_checkpoint, write_whole
from nmt_moe.checkpoints.files import check_output
from nmt_moe.checkpoints.network import EARLY_NAMES, read_network
from nmt_moe.inference import BundleConfig, verify_bundle
from nmt_moe.inference.bundle import (
    CARD,
    CONFIG,
    SUMS,
    WEIGHTS,
    parse_config,
    read_small,
    read_sums,
)
from nmt_moe.inference.exporting import check_replaceable
from nmt_moe.inference.storing import save_experts, save_tensors
from nmt_moe.inference.weights import experts_file, map_file
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, LSTMLMConfig
from nmt_moe.resizing.layers import Layer
from nmt_moe.text.digests import write_digests

PARAMETER = re.compile(r"(encoder|decoder)\.(?:network\.)?moe\.moe\.(gate|experts)\.(.+)")
Network = GNMTConfig | LSTMLMConfig
Layers = dict[str, Layer]


def read_model(path: Path) -> Checkpoint | StoredBundle:
    """Read a checkpoint, or a bundle if `path` is a folder.

    Raises:
        ValueError: if the model is damaged or has no MoE layers.
    """
    found = StoredBundle.read(path) if path.is_dir() else Checkpoint.read(path)
    if not found.layers:
        raise ValueError(
            f"`{path}` has no MoE layers, so it has no experts to change. Name a model with MoE "
            "layers, which may have a single expert each (as in `--arch lstm_gnmt_small`)."
        )
    return found


def new_network(network: Network, layers: Layers) -> Network:
    """Return the configuration of a network after its MoE layers have been replaced by `layers`."""
    moe = layers["encoder" if "encoder" in layers else "decoder"].moe
    if not isinstance(network, GNMTConfig):
        return replace(network, moe=moe)
    num_experts = layers["decoder"].moe.num_experts
    other = 0 if num_experts == moe.num_experts else num_experts
    return replace(network, moe=moe, decoder_num_experts=other)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: Path of the checkpoint.
        network: Configuration of the network.
        layers: The MoE layers by side, "encoder" or "decoder".
        state: Contents of the checkpoint.
    """

    path: Path
    network: Network
    layers: Layers
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a checkpoint with all its experts, but without the optimizer state."""
        state = load_checkpoint(path, with_optimizer=False)
        network = read_network(path, state).config
        return cls(path, network, _find_layers(network, state["model"]), state)

    def write(self, output: Path, layers: Layers, note: str, is_overwritten: bool = False) -> None:
        """Write the checkpoint with different layers, and without the optimizer state.

        The result can be trained further with `fairseq-train --finetune-from-model`.

        Args:
            output: The file to write.
            layers: The new layers, by side.
            note: Text to store in the checkpoint's `extra_state`, under "resized".
            is_overwritten: Whether to replace an output that exists.

        Raises:
            ValueError: if the output exists and must not be replaced, or is the model itself.
        """
        check_output(output, is_overwritten)
        _check_other(output, self.path)
        model = dict(self.state["model"])
        for name in self.state["model"]:
            found = PARAMETER.fullmatch(name)
            if found is not None:
                layer = layers[found[1]]
                values = layer.gate if found[2] == "gate" else layer.experts
                model[name] = values[found[3]]
        cfg = dict(self.state["cfg"])
        cfg["model"] = _set_options(cfg["model"], new_network(self.network, layers))
        extra = dict(self.state.get("extra_state") or {})
        extra["resized"] = [*extra.get("resized", []), note]
        output.parent.mkdir(parents=True, exist_ok=True)
        state = {**self.state, "model": model, "cfg": cfg, "extra_state": extra}
        state.pop("last_optimizer_state", None)
        write_whole(output, state)


@dataclass(frozen=True)
class StoredBundle:
    """A bundle with weights mapped from its files.

    Attributes:
        path: Folder of the bundle.
        config: The bundle's configuration.
        layers: The MoE layers by side, "encoder" or "decoder".
        dense: All parameters except the experts' parameters, by name.
    """

    path: Path
    config: BundleConfig
    layers: Layers
    dense: dict[str, Tensor]

    @property
    def network(self) -> Network:
        """Return the configuration of the network."""
        return self.config.network

    @classmethod
    def read(cls, folder: Path) -> StoredBundle:
        """Read a bundle, and compare every file and every expert with its digest."""
        verify_bundle(folder)
        config = parse_config(folder / CONFIG, read_small(folder, CONFIG))
        dense = map_file(folder / WEIGHTS)
        parameters = dict(dense)
        for side in ("encoder", "decoder"):
            if (folder / experts_file(side)).is_file():
                experts = map_file(folder / experts_file(side))
                prefix = f"{side}.moe.moe.experts."
                parameters |= {prefix + name: value for name, value in experts.items()}
        return cls(folder, config, _find_layers(config.network, parameters, config.dtype), dense)

    def write(self, output: Path, layers: Layers, note: str, is_overwritten: bool = False) -> None:
        """Write the bundle with different layers.

        The arguments and errors are the same as in `Checkpoint.write`, except that the note becomes
        a section of the model card.
        """
        check_output(output, is_overwritten)
        check_replaceable(output)
        _check_other(output, self.path)
        config = replace(self.config, network=new_network(self.network, layers))
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as scratch:
            part = Path(scratch) / "bundle"
            part.mkdir()
            self._write_parts(part, config, layers, note)
            verify_bundle(part)
            if output.is_dir():
                output.rename(Path(scratch) / "replaced")
            part.rename(output)

    def _write_parts(self, part: Path, config: BundleConfig, layers: Layers, note: str) -> None:
        changed = {CONFIG, WEIGHTS, CARD, SUMS, *map(experts_file, layers)}
        for name in read_sums(self.path).keys() - changed:
            shutil.copyfile(self.path / name, part / name)
        (part / CONFIG).write_text(config.to_json(), encoding="utf-8")
        dense = dict(self.dense)
        for side, layer in layers.items():
            save_experts(part / experts_file(side), layer.experts)
            dense |= {f"{side}.moe.moe.gate.{name}": value for name, value in layer.gate.items()}
        save_tensors(part / WEIGHTS, {name: value.contiguous() for name, value in dense.items()})
        card = (self.path / CARD).read_text(encoding="utf-8") if self._has_card else ""
        (part / CARD).write_text(f"{card}\n## Changed after training\n\n{note}\n", encoding="utf-8")
        write_digests(part / SUMS, sorted(part.iterdir()))

    @property
    def _has_card(self) -> bool:
        return (self.path / CARD).is_file()


def _check_other(output: Path, path: Path) -> None:
    if output.exists() and output.samefile(path):
        raise ValueError(
            f"`{output}` is the model itself, which must not be replaced. Specify another output."
        )


def _find_layers(
    network: Network, parameters: Mapping[str, Tensor], dtype: str | None = None
) -> Layers:
    """Return the MoE layers among the parameters of a network."""
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, value in parameters.items():
        found = PARAMETER.fullmatch(name)
        if found is not None:
            of_side = parts.setdefault(found[1], {"gate": {}, "experts": {}})
            of_side[found[2]][found[3]] = value
    layers = {}
    for side in sorted(parts, reverse=True):  # encoder first
        moe = _moe_of(network, side)
        assert moe is not None
        layers[side] = Layer(moe, parts[side]["gate"], parts[side]["experts"], dtype)
    return layers


def _moe_of(network: Network, side: str) -> MoEConfig | None:
    if isinstance(network, GNMTConfig) and side == "decoder":
        return network.decoder_moe
    return network.moe


def _set_options(model: Any, network: Network) -> Any:
    """Return the options of a checkpoint's model with the sizes of the new layers."""
    moe = network.moe
    assert moe is not None
    options = dict(vars(model)) if isinstance(model, argparse.Namespace) else dict(model)
    values = {"num_experts": moe.num_experts, "top_k": moe.top_k, "num_groups": moe.num_groups}
    if isinstance(network, GNMTConfig) and network.decoder_num_experts:
        values["decoder_num_experts"] = network.decoder_num_experts
    elif "decoder_num_experts" in options:
        values["decoder_num_experts"] = 0
    early = {name: old for old, name in EARLY_NAMES.items() if old in options}
    options |= {early.get(name, name): value for name, value in values.items()}
    return argparse.Namespace(**options) if isinstance(model, argparse.Namespace) else options
