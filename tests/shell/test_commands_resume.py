"""A training run that stops and resumes is bit-identical to an uninterrupted run."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nmt_moe.trainer.precision import master_weights, set_master_weights
from tests.support.commands import call
from tests.support.training import TINY_MOE, assert_same_bits, load


def train(data: Path, folder: Path, epochs: int, *flags: object) -> Path:
    call("train", data, *TINY_MOE, "--max-epoch", epochs, "--save-dir", folder, *flags)
    return folder


def assert_same_training(expected: Path, actual: Path) -> None:
    one, other = load(expected), load(actual)
    assert one["optimizer_history"][-1]["num_updates"] == 24
    for part in ("model", "last_optimizer_state"):
        assert_same_bits(one[part], other[part], part)
    assert one["extra_state"]["train_iterator"] == other["extra_state"]["train_iterator"]
    assert one["extra_state"]["val_loss"] == other["extra_state"]["val_loss"]


def test_two_epochs_and_two_more_give_the_same_bits_as_four(
    data: Path, trained: Path, tmp_path: Path
):
    train(data, tmp_path, 2)
    train(data, tmp_path, 4)
    assert_same_training(trained / "checkpoint4.pt", tmp_path / "checkpoint_last.pt")


def test_training_killed_within_an_epoch_resumes_with_the_same_bits(
    data: Path, trained: Path, tmp_path: Path
):
    # Update 8 is the second of six updates in epoch 2.
    shutil.copy(trained / "checkpoint_2_8.pt", tmp_path / "checkpoint_last.pt")
    train(data, tmp_path, 4)
    assert_same_training(trained / "checkpoint4.pt", tmp_path / "checkpoint_last.pt")


def test_accumulated_updates_resume_bit_for_bit(data: Path, tmp_path: Path):
    # Each epoch has six batches, which make three updates of two batches each.
    flags = ["--update-freq", 2, "--save-interval-updates", 4]
    train(data, tmp_path / "one", 2, *flags)
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one/checkpoint_2_4.pt", tmp_path / "two/checkpoint_last.pt")
    train(data, tmp_path / "two", 2, *flags)
    one, two = (load(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    assert_same_bits(one["model"], two["model"])
    assert_same_bits(one["last_optimizer_state"], two["last_optimizer_state"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--bf16"],
        ["--fp16", "--fp16-scale-window", 5],  # the scale changes after resuming
        ["--memory-efficient-bf16"],
        ["--memory-efficient-fp16", "--fp16-scale-window", 5],
        ["--fp16", "--optimizer", "factored_adam"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_training_in_half_precision_resumes_bit_for_bit(data: Path, tmp_path: Path, flags: list):
    # With --bf16 and --fp16, the trainer updates float32 copies of the weights and saves them.
    train(data, tmp_path / "unbroken", 2, "--save-interval-updates", 8, *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "unbroken/checkpoint_2_8.pt", tmp_path / "resumed/checkpoint_last.pt")
    train(data, tmp_path / "resumed", 2, *flags)
    one, two = (load(tmp_path / name / "checkpoint_last.pt") for name in ("unbroken", "resumed"))
    assert_same_bits(one["model"], two["model"])
    assert_same_bits(one["last_optimizer_state"], two["last_optimizer_state"])
    assert one["extra_state"]["loss_scaler"] == two["extra_state"]["loss_scaler"]


def test_flat_copies_of_half_precision_weights_are_saved_under_their_names():
    model = torch.nn.Linear(3, 2).half()
    flat = torch.arange(8.0) / 3
    optimizer = SimpleNamespace(fp16_params=list(model.parameters()), fp32_params={0: flat})
    expected = {"weight": flat[:6].view(2, 3), "bias": flat[6:]}
    assert_same_bits(expected, master_weights(model, optimizer))
    set_master_weights(model, optimizer, {"weight": torch.ones(2, 3) / 7, "bias": flat[6:]})
    assert flat.equal(torch.tensor([1 / 7] * 6 + [2.0, 7 / 3]))


def test_the_bits_depend_on_the_seed(data: Path, trained: Path, tmp_path: Path):
    train(data, tmp_path, 1, "--seed", 4)
    one, other = load(trained / "checkpoint1.pt"), load(tmp_path / "checkpoint1.pt")
    name = "decoder.network.moe.moe.gate.gate_weight"
    assert not one["model"][name].equal(other["model"][name])
