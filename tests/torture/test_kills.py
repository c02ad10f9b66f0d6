"""Whenever a process is killed, a complete checkpoint remains, and resuming loses nothing."""

import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from nmt_moe.checkpoints import load_checkpoint, remove_unused_files
from nmt_moe.checkpoints.reshape import split_checkpoint
from tests.checkpoints.test_expert_files import NAME, whole_state
from tests.support.commands import call
from tests.support.corpus import preprocess_flags, write_corpus
from tests.support.training import TINY_MOE, assert_same_bits, load

LAST = "checkpoint_last.pt"


def save_for_ever(folder: Path, first: int) -> None:
    """Save one checkpoint after another, each with its number in the weights and the experts."""
    torch.set_num_threads(1)
    for number in range(first, first + 100_000):
        state = whole_state()
        state["model"]["embed"].fill_(number)
        state["model"][NAME].fill_(number)
        split_checkpoint(state, folder / LAST, 3)
        remove_unused_files(folder)


@pytest.mark.parametrize("rounds", [8, pytest.param(400, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_a_complete_checkpoint(rounds: int, tmp_path: Path):
    chance, number, path = random.Random(rounds), 0, tmp_path / LAST
    context = multiprocessing.get_context("fork")
    for _ in range(rounds):
        saver = context.Process(target=save_for_ever, args=(tmp_path, number))
        before = path.stat().st_mtime_ns if path.exists() else 0
        saver.start()
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert saver.is_alive()
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)
        saver.kill()
        saver.join()
        assert saver.exitcode == -signal.SIGKILL
        weights = load_checkpoint(path)["model"]
        values = {*weights["embed"].flatten().tolist(), *weights[NAME].flatten().tolist()}
        assert len(values) == 1
        assert values.pop() >= number
        number += 1000
    remove_unused_files(tmp_path)
    assert len(list(tmp_path.glob("experts-*"))) == 3


def train_in_a_child(*arguments: object) -> multiprocessing.Process:
    """Start a training run in a process that has already imported everything."""
    training = multiprocessing.get_context("fork").Process(target=call, args=("train", *arguments))
    training.start()
    return training


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_that_is_killed_repeatedly_ends_with_the_same_bits_as_uninterrupted_training(
    tmp_path: Path,
):
    data = tmp_path / "data"
    call("preprocess", *preprocess_flags(write_corpus(tmp_path / "corpus"), data))
    flags = [*TINY_MOE, "--save-interval-updates", 1, "--keep-interval-updates", 3]
    flags += ["--no-epoch-checkpoints", "--max-update", 24]
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    training = train_in_a_child(data, *flags, "--save-dir", unbroken)
    training.join()
    chance, kills = random.Random(1), 0
    while True:
        training = train_in_a_child(data, *flags, "--save-dir", killed)
        last, seen, saves = killed / LAST, None, chance.randint(1, 5)
        while training.is_alive() and saves >= 0:
            saved = last.stat().st_mtime_ns if last.exists() else 0
            saves, seen = saves - (saved != seen), saved
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)
        training.kill()
        training.join()
        for path in killed.glob("*.pt"):
            load(path)
        if training.exitcode == 0:
            break
        assert training.exitcode == -signal.SIGKILL
        kills += 1
    assert kills > 3
    one, two = (load(folder / LAST) for folder in (unbroken, killed))
    assert_same_bits(one["model"], two["model"])
    assert_same_bits(one["last_optimizer_state"], two["last_optimizer_state"])
