"""Compare a model before and after a change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nmt_moe.inference import total_score
from nmt_moe.inspection import Part, collect_usage, load_model
from nmt_moe.moe import MoELayer
from nmt_moe.resizing.layers import Layer
from nmt_moe.resizing.models import Checkpoint, Layers, StoredBundle

SAMPLE_TOKENS = 256


def find_reader(model: Checkpoint | StoredBundle, bundle: Path | None) -> StoredBundle:
    """Return the bundle that reads text for a model.

    This is the model itself if it is a bundle. For a checkpoint, it is `bundle`, which must have
    been exported from the checkpoint.

    Raises:
        ValueError: if a checkpoint comes without a bundle or with the bundle of another model, or
            if `model` and `bundle` are both bundles.
    """
    if isinstance(model, StoredBundle):
        if bundle is not None:
            raise ValueError(
                "`--bundle` is only for checkpoints, because a bundle reads text itself. Omit it."
            )
        return model
    if bundle is None:
        raise ValueError(
            f"`{model.path}` is a checkpoint, which cannot split text into pieces. Use `--bundle "
            "FOLDER` to name the bundle that `nmt-moe export` made from it."
        )
    reader = StoredBundle.read(bundle)
    for side, layer in model.layers.items():
        other = reader.layers.get(side)
        for name, value in layer.gate.items():
            # Gates are stored in float32 in every bundle.
            stored = None if other is None else other.gate.get(name)
            if stored is not None and not torch.equal(stored, value.float()):
                raise ValueError(
                    f"`{bundle}` was not exported from `{model.path}`, because its gates differ. "
                    "Export the checkpoint again with `nmt-moe export`."
                )
        if other is None or other.moe.num_experts != layer.moe.num_experts:
            raise ValueError(
                f"`{bundle}` was not exported from `{model.path}`, because its experts differ. "
                "Export the checkpoint again with `nmt-moe export`."
            )
    return reader


@contextmanager
def changed_reader(
    model: Checkpoint | StoredBundle, reader: StoredBundle, output: Path, layers: Layers
) -> Iterator[Path]:
    """Yield the path of a bundle that has been changed in the same way as a model.

    Args:
        model: The model before it was changed.
        reader: The bundle that reads text for the model.
        output: Path that the changed model was written to.
        layers: The reader's layers, changed in the same way.
    """
    if isinstance(model, StoredBundle):
        yield output
        return
    with TemporaryDirectory(prefix="nmt-moe-") as scratch:
        folder = Path(scratch) / "bundle"
        reader.write(folder, layers, "")
        yield folder


def measure_perplexity(folder: Path, parts: Sequence[Part], *, progress: bool = False) -> float:
    """Return the perplexity per piece of the references, or of the texts for a language model.

    Args:
        folder: Folder of the bundle.
        parts: Texts to read; for a translation model, with references.
        progress: Whether to show a progress bar.
    """
    model = load_model(folder)
    usages = [
        collect_usage(model, one.text, one.references, one.target_lang, progress=progress)
        for one in parts
    ]
    scores = [usage.score for usage in usages if usage.score is not None]
    return total_score(scores).perplexity_per_piece


@torch.no_grad()
def measure_difference(before: Layer, after: Layer) -> float:
    """Return the largest difference between the outputs of two layers.

    Both layers process the same random tokens in float64.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLE_TOKENS, before.moe.model_dim, generator=generator, dtype=torch.float64)
    outputs = []
    for layer in (before, after):
        module = MoELayer(layer.moe).double().eval()
        weight_in, weight_out = layer.float_experts()
        module.load_state_dict(
            {
                **module.state_dict(),  # bundles do not store the noise weights
                **{f"gate.{name}": value for name, value in layer.gate.items()},
                "experts.weight_in": weight_in,
                "experts.weight_out": weight_out,
            }
        )
        outputs.append(module(x)[0])
    return float((outputs[0] - outputs[1]).abs().max())
