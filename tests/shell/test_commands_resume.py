"""Training that stops and goes on gives the bits of one that never stopped."""

import shutil
from pathlib import Path

import pytest

from tests.support.commands import call
from tests.support.training import TINY_MOE, assert_same_bits, load


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that never stopped: 4 epochs of 6 updates."""
    return train(data, tmp_path_factory.mktemp("unbroken"), 4, "--save-interval-updates", 8)


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


def test_two_epochs_and_two_more_give_the_bits_of_four(data: Path, unbroken: Path, tmp_path: Path):
    train(data, tmp_path, 2)
    train(data, tmp_path, 4)
    assert_same_training(unbroken / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt")


def test_a_training_killed_within_an_epoch_gives_the_same_bits(
    data: Path, unbroken: Path, tmp_path: Path
):
    # Update 8 is the second of epoch 2's six.
    shutil.copy(unbroken / "checkpoint_2_8.pt", tmp_path / "checkpoint_last.pt")
    train(data, tmp_path, 4)
    assert_same_training(unbroken / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt")


def test_accumulated_updates_resume_bit_for_bit(data: Path, tmp_path: Path):
    # 6 batches in 3 updates of 2; each start draws the noise of all batches anew.
    flags = ["--update-freq", 2, "--save-interval-updates", 4]
    train(data, tmp_path / "one", 2, *flags)
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one/checkpoint_2_4.pt", tmp_path / "two/checkpoint_last.pt")
    train(data, tmp_path / "two", 2, *flags)
    one, two = (load(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    assert_same_bits(one["model"], two["model"])
    assert_same_bits(one["last_optimizer_state"], two["last_optimizer_state"])


@pytest.mark.parametrize("precision", ["--memory-efficient-bf16", "--memory-efficient-fp16"])
def test_weights_of_half_precision_alone_resume_bit_for_bit(
    data: Path, tmp_path: Path, precision: str
):
    # With --bf16 and --fp16 a copy in float32 is trained, which fairseq does not save.
    train(data, tmp_path / "unbroken", 2, precision)
    for epochs in (1, 2):
        train(data, tmp_path / "resumed", epochs, precision)
    one, two = (load(tmp_path / name / "checkpoint_last.pt") for name in ("unbroken", "resumed"))
    assert_same_bits(one["model"], two["model"])
    assert_same_bits(one["last_optimizer_state"], two["last_optimizer_state"])


def test_the_bits_depend_on_the_seed(data: Path, unbroken: Path, tmp_path: Path):
    train(data, tmp_path, 1, "--seed", 4)
    one, other = load(unbroken / "checkpoint1.pt"), load(tmp_path / "checkpoint1.pt")
    name = "decoder.network.moe.moe.gate.gate_weight"
    assert not one["model"][name].equal(other["model"][name])
