"""If a process of a training run dies, the others stop and all checkpoints remain intact."""

import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from torch import distributed

from nmt_moe import plugin
from nmt_moe.checkpoints import expert_files, restore_experts
from nmt_moe.compat.errors import explain
from nmt_moe.trainer.experts import moe_layers
from tests.support import programs
from tests.support.commands import PLUGIN, call
from tests.support.ranks import CONTEXT, free_port
from tests.support.training import TINY_MOE, load

plugin.register()

# The other processes notice a death at their next exchange, and torchrun within a second. The limit
# allows for a busy machine.
STOPPED_WITHIN = 60  # seconds


def report_stop(killed_at: float) -> None:
    """Print how long the other processes continued; `pytest -rP` shows it."""
    print(f"stopped after {time.monotonic() - killed_at:.1f} s")  # noqa: T201


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.timeout(280)
def test_a_killed_process_stops_the_others_and_training_can_continue(data: Path, tmp_path: Path):
    last, log = tmp_path / "checkpoint_last.pt", tmp_path / "log"
    flags = [*TINY_MOE, "--no-epoch-checkpoints", "--save-dir", tmp_path]
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *runner, "-m", "fairseq_cli.train", data, *flags]
    command += ["--user-dir", PLUGIN]
    with log.open("wb") as output:
        ranks = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": "", "PYTHON_EXEC": str(programs.python())},
            cwd=tmp_path,
        )
    try:
        deadline = time.monotonic() + 200
        while not last.exists():
            assert ranks.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        killed = children(ranks.pid)[1]
        os.kill(killed, signal.SIGKILL)
        killed_at = time.monotonic()
        assert ranks.wait(STOPPED_WITHIN) != 0
        report_stop(killed_at)
    finally:
        ranks.terminate()
    assert f"Signal 9 (SIGKILL) received by PID {killed}" in log.read_text()
    done = load(last)["optimizer_history"][-1]["num_updates"]
    call("train", data, *flags, "--max-update", done + 1)
    assert load(last)["optimizer_history"][-1]["num_updates"] == done + 1


def train_on_two(rank: int, port: int, data: Path, folder: Path, *flags: object) -> None:
    """Run one of two processes that train together."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ranks = ["--distributed-world-size", 2, "--distributed-no-spawn", "--distributed-rank", rank]
    ranks += ["--distributed-init-method", "tcp://unused", "--cpu"]
    call("train", data, *TINY_MOE, *flags, *ranks, "--save-dir", folder)


def start_two(function: Callable[..., None], *arguments: object) -> list[Any]:
    """Start `function(rank, port, *arguments)` in two processes."""
    port = free_port()
    ranks = [
        CONTEXT.Process(target=function, args=(rank, port, *arguments), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    return ranks


def die_while_saving(rank: int, port: int, data: Path, folder: Path) -> None:
    """Train, and kill process 1 in its second save, halfway through its expert file."""
    save, calls = torch.save, []

    def save_half(content: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    if rank == 1:
        expert_files.torch.save = save_half
    train_on_two(rank, port, data, folder, *EACH_UPDATE)


EACH_UPDATE = ["--no-epoch-checkpoints", "--save-interval-updates", 1, "--max-update", 4]


@pytest.mark.timeout(280)
def test_a_process_killed_while_saving_leaves_the_previous_save(data: Path, tmp_path: Path):
    ranks = start_two(die_while_saving, data, tmp_path)
    ranks[1].join(200)
    assert ranks[1].exitcode == -signal.SIGKILL
    killed_at = time.monotonic()
    ranks[0].join(STOPPED_WITHIN)
    report_stop(killed_at)
    assert ranks[0].exitcode == 1  # the other process stops instead of waiting
    last = tmp_path / "checkpoint_last.pt"
    assert list(tmp_path.glob("experts-*.tmp"))
    state = load(last)
    assert state["optimizer_history"][-1]["num_updates"] == 1
    restore_experts(last, state)
    call("train", data, *TINY_MOE, *EACH_UPDATE, "--save-dir", tmp_path)
    assert load(last)["optimizer_history"][-1]["num_updates"] == 4


def spoil(rank: int, port: int, data: Path, folder: Path, what: str) -> None:
    """Train with NaN in the third update of process 1, and write errors to `folder/error{rank}`."""
    step, updates = Trainer.train_step, []

    def spoiled_step(self: Trainer, samples: Any, raise_oom: bool = False) -> Any:
        updates.append(1)
        if len(updates) == 3:
            layer = next(moe_layers(self.get_model()))
            if what == "token":
                self.get_model().encoder.network.embedding.weight.data.fill_(math.nan)
            else:
                layer.experts.weight_in.register_hook(lambda grad: grad.fill_(math.nan))
        return step(self, samples, raise_oom)

    if rank == 1:
        Trainer.train_step = spoiled_step
    try:
        train_on_two(rank, port, data, folder, *EACH_UPDATE)
    except BaseException as error:
        (folder / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def save_where_nothing_can_be_written(rank: int, port: int, data: Path, folder: Path) -> None:
    """Train with a save folder on a read-only disk, and write messages to `folder/error{rank}`."""

    def mkdtemp(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    tempfile.mkdtemp = mkdtemp
    try:
        train_on_two(rank, port, data, folder, *EACH_UPDATE)
    except BaseException as error:
        (folder / f"error{rank}").write_text(str(explain(error)))
        raise


@pytest.mark.timeout(280)
def test_a_read_only_save_folder_is_reported_once_before_the_first_update(
    data: Path, tmp_path: Path
):
    ranks = start_two(save_where_nothing_can_be_written, data, tmp_path)
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [1, 1]
    first, second = ((tmp_path / f"error{rank}").read_text() for rank in range(2))
    assert first.startswith("`--save-dir` must be a folder where files can be written")
    assert f"this failed in `{tmp_path}`: Read-only file system" in first
    cause = "see its error message for the cause"
    assert second == f"another process in this training run has ended; {cause}"
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        # One process reports the NaN, and the other reports that the first has ended.
        (
            "token",
            ["RuntimeError: .*Connection", "FloatingPointError: .*NaN in .*encoder's MoE layer"],
        ),
        # The gradient norm covers all processes, so each of them finds the fault.
        ("gradient", ["FloatingPointError: .*gradients"] * 2),
    ],
)
@pytest.mark.timeout(280)
def test_a_value_that_is_not_finite_in_one_process_stops_all(data, tmp_path, what, messages):
    ranks = start_two(spoil, data, tmp_path, what)
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [1, 1]
    for rank, message in enumerate(messages):
        assert re.search(message, (tmp_path / f"error{rank}").read_text())
    assert load(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 2


def test_an_interrupted_copy_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch):
    old, new = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint1.pt"
    old.write_text("old")
    new.write_text("new")

    def copy_half(source: BinaryIO, destination: BinaryIO, length: int) -> None:
        destination.write(source.read(1))
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(shutil, "copyfileobj", copy_half)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_text() == "old"
    assert PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_text() == "new"
