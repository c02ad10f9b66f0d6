"""Language models and lower precisions with experts spread over two processes."""

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fairseq.trainer import Trainer
from torch import nn

from nmt_moe.parallel import is_shard
from nmt_moe.trainer import data_parallel
from tests.support.commands import call
from tests.support.language_model import EVALUATE, TINY_LM
from tests.support.ranks import run_ranks
from tests.support.training import copy_checkpoint, load, load_whole

LAST = "checkpoint_last.pt"
FEW = ["--clip-norm", 0.5, "--no-epoch-checkpoints"]
# Each token uses all experts, without noise or dropout, so that one process can give the same
# results. Epsilon is large, because otherwise Adam would turn rounding errors in zero gradients
# into full steps. An epoch has five batches, so one of two processes is idle in the third update.
EXACT = [*FEW, "--moe-gate", "softmax", "--dropout", 0, "--adam-eps", 1.0, "--lr", 0.5]
EXACT += ["--max-update", 4, "--save-interval-updates", 2]
HALF = [*FEW, "--max-update", 5, "--sampled-softmax", 8, "--fp16-init-scale", 4]
FP16 = ["fp16", "memory-efficient-fp16"]
PRECISIONS = ["bf16", "memory-efficient-bf16", *FP16]
# An expert's gradient overflows in this update, which is one of the five in `HALF`.
OVERFLOW = 3


def work(rank: int, data: Path, folder: Path) -> dict[str, Any]:
    """Do all training runs for the tests below together, because starting processes is slow."""
    ranks = ["--distributed-world-size", 2, "--distributed-no-spawn", "--distributed-rank", rank]
    ranks += ["--distributed-init-method", "tcp://unused", "--cpu"]

    def train(name: str, *flags: object) -> str:
        folders = ["--save-dir", folder / name]
        return call("train", data, *TINY_LM, *flags, *ranks, *folders).text

    train("exact", *EXACT)
    train("resumed", *EXACT)
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        for size in (1, 2):
            split = ["--expert-parallel-size", size]
            train(f"{precision}{size}", *HALF, *split, f"--{precision}")
    for precision in FP16:
        with watch_parameters() as sums, overflow_experts(rank == 1):
            text = train(f"{precision}-overflow", *HALF, f"--{precision}")
        found[precision] = text.count("gradient overflow detected"), sums
    # Ten sentences form five batches. One process evaluates three of them, and the other two.
    path = folder / "exact" / LAST
    done = call("eval_lm", data, *EVALUATE, *BATCHES_OF_TWO, "--path", path, *ranks)
    found["evaluated"] = scores(done.text) if rank == 0 else None  # the other prints nothing
    return found


@contextmanager
def watch_parameters() -> Iterator[list[tuple[float, float]]]:
    """Record the summed magnitudes of dense parameters and of experts after each update."""
    step, seen = Trainer.train_step, []

    def train_step(self: Trainer, *args: Any, **kw: Any) -> Any:
        result = step(self, *args, **kw)
        sums = {False: 0.0, True: 0.0}
        for parameter in self.model.parameters():
            sums[is_shard(parameter)] += parameter.detach().double().abs().sum().item()
        seen.append((sums[False], sums[True]))
        return result

    with mock.patch.object(Trainer, "train_step", train_step):
        yield seen


@contextmanager
def overflow_experts(is_here: bool) -> Iterator[None]:
    """Make one element of an expert's gradient infinite in one update, if `is_here`."""
    average, calls = data_parallel.average_shard_gradients, []

    def overflow_and_average(parameters: Iterator[nn.Parameter]) -> None:
        parameters = list(parameters)
        calls.append(1)
        if is_here and len(calls) == OVERFLOW:
            expert = next(p for p in parameters if is_shard(p))
            expert.grad.view(-1)[0] = math.inf
        average(parameters)

    with mock.patch.object(data_parallel, "average_shard_gradients", overflow_and_average):
        yield


BATCHES_OF_TWO = ["--gen-subset", "test", "--sample-break-mode", "eos", "--batch-size", 2]


def scores(text: str) -> tuple[int, float]:
    """Return the number of tokens and the loss in bits that fairseq-eval-lm prints."""
    tokens = re.search(r"Evaluated ([\d,]+) tokens", text)
    loss = re.search(r"Loss \(base 2\): ([\d.]+)", text)
    return int(tokens[1].replace(",", "")), float(loss[1])


@pytest.fixture(scope="module")
def one_process(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for 4 updates in one process, with the batches of two processes."""
    folder = tmp_path_factory.mktemp("one")
    call("train", text_data, *TINY_LM, *EXACT, "--update-freq", 2, "--save-dir", folder)
    return folder


@pytest.fixture(scope="module")
def two_processes(
    text_data: Path, one_process: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Do all training runs in two processes; return their folder and each process's results."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "resumed").mkdir()
    shutil.copy(one_process / "checkpoint_1_2.pt", folder / "resumed" / LAST)
    return folder, run_ranks(work, 2, text_data, folder)


def assert_same_training(expected: Path, actual: Path, tolerance: float) -> None:
    one, other = load_whole(expected), load_whole(actual)
    assert one["model"].keys() == other["model"].keys()
    for name, value in one["model"].items():
        torch.testing.assert_close(
            other["model"][name],
            value,
            atol=tolerance,
            rtol=tolerance,
            check_dtype=False,
            msg=name,
        )
    states = [checkpoint["last_optimizer_state"]["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    for index, values in states[0].items():
        for name, value in values.items():
            torch.testing.assert_close(
                states[1][index][name], value, atol=tolerance, rtol=tolerance
            )


@pytest.mark.timeout(590)
@pytest.mark.parametrize("name", ["exact", "resumed"])
def test_two_processes_with_half_the_experts_each_learn_the_same_as_one(
    name, one_process, two_processes
):
    assert_same_training(one_process / LAST, two_processes[0] / name / LAST, 1e-4)


def test_one_process_continues_from_the_files_of_two(
    text_data, one_process, two_processes, tmp_path
):
    copy_checkpoint(two_processes[0] / "exact/checkpoint_1_2.pt", tmp_path)
    call("train", text_data, *TINY_LM, *EXACT, "--update-freq", 2, "--save-dir", tmp_path)
    assert_same_training(one_process / LAST, tmp_path / LAST, 1e-4)


def test_perplexity_equals_that_of_one_process_however_many_batches_each_has(
    text_data, one_process, two_processes
):
    folder, found = two_processes
    spread = folder / "exact" / LAST
    losses = [
        scores(call("eval_lm", text_data, *EVALUATE, *BATCHES_OF_TWO, "--path", path, *shard).text)
        for path, shard in [
            (one_process / LAST, []),
            (spread, []),
            (spread, ["--num-shards", 2, "--shard-id", 0]),
        ]
    ]
    assert losses[0] == (losses[1][0], pytest.approx(losses[1][1], abs=1e-3))
    assert found[0]["evaluated"] == (losses[2][0], pytest.approx(losses[2][1], abs=1e-3))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_at_lower_precision_spread_experts_learn_the_same_as_copies_except_for_rounding(
    precision, two_processes
):
    copies, spread = (two_processes[0] / f"{precision}{size}" / LAST for size in (1, 2))
    assert load(spread)["optimizer_history"][-1]["num_updates"] == 5
    assert_same_training(copies, spread, 0.05)


@pytest.mark.parametrize("precision", FP16)
def test_all_processes_skip_the_update_in_which_an_expert_of_one_overflows(
    precision, two_processes
):
    folder, found = two_processes
    (overflows, first), (_, second) = (rank[precision] for rank in found)  # only one of them logs
    assert overflows == 1
    assert load(folder / f"{precision}-overflow" / LAST)["last_optimizer_state"]["loss_scale"] == 2
    assert [dense for dense, _ in first] == [dense for dense, _ in second]
    for sums in (first, second):
        is_kept = [now == before for before, now in zip(sums, sums[1:], strict=False)]
        # Only the skipped update left both dense parameters and experts unchanged.
        assert is_kept == [step == OVERFLOW for step in range(2, 7)]
