"""Data-parallel training on the CPU, in two processes that use gloo over the loopback interface."""

import math
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.commands import PLUGIN, Output, call, run
from tests.support.training import BALANCE_KEYS, TINY_MOE, load

UPDATES = ["--max-update", 3, "--log-interval", 1, "--no-epoch-checkpoints"]
# Noise and dropout are off, because each process would draw its own. Epsilon is large, because
# otherwise Adam would turn gradients that differ from 0 only by rounding into full steps.
EXACT = ["--num-experts", 1, "--moe-top-k", 1, "--dropout", 0, "--adam-eps", 1.0, "--lr", 0.5]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_in_two_processes(data: Path, folder: Path, *flags: object) -> list[Output]:
    """Start both ranks, and let the first write `folder/ranks`."""
    together = [
        *["--distributed-world-size", 2, "--distributed-no-spawn", "--ddp-backend", "legacy_ddp"],
        *["--distributed-init-method", f"tcp://127.0.0.1:{free_port()}"],
        *["--distributed-backend", "gloo", "--user-dir", PLUGIN, "--save-dir", folder / "ranks"],
    ]

    def start(rank: int) -> Output:
        shared = [*TINY_MOE, *UPDATES, *together, *flags]
        return run("train", data, *shared, "--distributed-rank", rank, cwd=folder)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, range(2)))
    for rank, output in enumerate(done):
        assert output.status == 0, f"rank {rank}:\n{output.text}"
    return done


@pytest.mark.timeout(280)
def test_two_processes_train_and_log_the_balance_of_both(data: Path, tmp_path: Path):
    first, _ = train_in_two_processes(data, tmp_path)
    records = [row for row in first.records() if "nll_loss" in row]
    assert [row["num_updates"] for row in records] == [1, 2, 3]
    assert all(row["bsz"] == 32 for row in records)  # 16 from each process
    assert all(row.keys() >= BALANCE_KEYS for row in records)
    assert all(math.isfinite(value) for row in records for value in row.values())


@pytest.mark.timeout(280)
def test_two_processes_learn_the_same_as_one_with_both_batches(data: Path, tmp_path: Path):
    train_in_two_processes(data, tmp_path, *EXACT)
    accumulated = [*TINY_MOE, *UPDATES, *EXACT, "--update-freq", 2]
    call("train", data, *accumulated, "--save-dir", tmp_path / "one")
    two, one = (load(tmp_path / name / "checkpoint_last.pt") for name in ("ranks", "one"))
    assert two["extra_state"]["val_loss"] == pytest.approx(one["extra_state"]["val_loss"], abs=2e-3)
    for name, parameter in one["model"].items():
        torch.testing.assert_close(two["model"][name], parameter, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.timeout(280)
def test_accumulated_updates_with_an_uneven_end_equal_those_of_one_process(
    data: Path, tmp_path: Path
):
    # With seven batches, one rank has only one batch for the second update.
    seven = [*EXACT, "--batch-size", 14, "--required-batch-size-multiple", 1]
    first, _ = train_in_two_processes(data, tmp_path, *seven, "--update-freq", 2)
    accumulated = [*TINY_MOE, *UPDATES, *seven, "--update-freq", 4]
    alone = call("train", data, *accumulated, "--save-dir", tmp_path / "one")
    rows = [
        [row for row in output.records() if "nll_loss" in row and "gnorm" in row]
        for output in (first, alone)
    ]
    for key in ("loss", "gnorm", "wpb", "bsz"):
        two, one = ([row[key] for row in records] for records in rows)
        assert two == pytest.approx(one, rel=1e-3), key
    two, one = (load(tmp_path / name / "checkpoint_last.pt") for name in ("ranks", "one"))
    for name, parameter in one["model"].items():
        torch.testing.assert_close(two["model"][name], parameter, atol=1e-5, rtol=1e-4, msg=name)
