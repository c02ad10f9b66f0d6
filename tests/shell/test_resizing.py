"""fairseq's own commands continue to train models whose experts were changed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nmt_moe.resizing import read_model, upcycle
from tests.support.commands import call
from tests.support.training import SIZES, TINY_MOE, UPDATES, load_whole

DENSE = [
    *["--arch", "lstm_moe_gnmt", *SIZES, "--dropout", 0.0],
    *["--num-experts", 1, "--moe-top-k", 1, "--expert-hidden-dim", 16, *UPDATES],
]


def first_loss(flags: list[Any], data: Path, folder: Path, start: Path) -> float:
    """Return the loss in bits per token of the first update after a checkpoint."""
    done = call(
        *("train", data, *flags, "--save-dir", folder, "--finetune-from-model", start),
        *("--max-update", 3, "--log-interval", 1),
    )
    return next(entry["nll_loss"] for entry in done.records() if "nll_loss" in entry)


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a dense model for a short time."""
    folder = tmp_path_factory.mktemp("dense")
    call("train", data, *DENSE, "--save-dir", folder, "--max-epoch", 3)
    return folder / "checkpoint_last.pt"


def test_training_continues_from_an_upcycled_model_at_the_same_loss(
    data: Path, dense: Path, tmp_path: Path
):
    model = read_model(dense)
    layers = {side: upcycle(layer, 4, 2) for side, layer in model.layers.items()}
    model.write(tmp_path / "moe.pt", layers, "grown")
    grown = [*DENSE, "--num-experts", 4, "--moe-top-k", 2]
    before = first_loss(DENSE, data, tmp_path / "dense", dense)
    after = first_loss(grown, data, tmp_path / "grown", tmp_path / "moe.pt")
    assert math.isclose(before, after, abs_tol=2e-3)  # printed with three decimal places
    state = load_whole(tmp_path / "grown" / "checkpoint_last.pt")
    experts = state["model"]["decoder.network.moe.moe.experts.weight_in"]
    assert len(experts) == 4
    assert not torch.equal(experts[0], experts[1])  # they differ after one update


def test_training_continues_from_a_pruned_model(data: Path, checkpoint: Path, tmp_path: Path):
    model = read_model(checkpoint)
    kept = {"encoder": [0, 1, 3], "decoder": [1, 2]}
    layers = {side: layer.take(kept[side]) for side, layer in model.layers.items()}
    model.write(tmp_path / "small.pt", layers, "pruned")
    small = [*TINY_MOE, "--num-experts", 3, "--decoder-num-experts", 2]
    loss = first_loss(small, data, tmp_path / "small", tmp_path / "small.pt")
    from_start = [*small, "--save-dir", tmp_path / "new", "--max-update", 1, "--log-interval", 1]
    entries = call("train", data, *from_start).records()
    untrained = next(entry["nll_loss"] for entry in entries if "nll_loss" in entry)
    assert loss < untrained
    done = call("generate", data, "--path", tmp_path / "small.pt", "--cpu", "--max-len-b", 20)
    assert "BLEU4" in done.text


def test_layers_of_different_sizes_are_not_spread_over_processes(data: Path, tmp_path: Path):
    flags = ["--decoder-num-experts", 2, "--expert-parallel-size", 2, "--save-dir", tmp_path]
    with pytest.raises(ValueError, match=r"must be 1 if .* \(4 and 2\), but is 2"):
        call("train", data, *TINY_MOE, *flags, "--max-update", 1)
