"""A process of a training dies: the others stop, and its checkpoints are whole."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.file_io import PathManager
from support.commands import PLUGIN, call
from support.training import TINY_MOE, load
from torch import distributed

from nmt_moe import plugin
from nmt_moe.parallel import expert_files
from nmt_moe.parallel.expert_files import restore_experts

plugin.register()

# Also on a busy machine: the others notice at their next exchange, torchrun within a second.
STOPPED_WITHIN = 60  # seconds


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.timeout(280)
def test_a_killed_process_stops_the_others_and_the_training_goes_on(data: Path, tmp_path: Path):
    last, log = tmp_path / "checkpoint_last.pt", tmp_path / "log"
    flags = [*TINY_MOE, "--no-epoch-checkpoints", "--save-dir", tmp_path]
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*runner, "-m", "fairseq_cli.train", data, *flags, "--user-dir", PLUGIN]
    with log.open("wb") as output:
        ranks = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
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
        assert ranks.wait(STOPPED_WITHIN) != 0
    finally:
        ranks.terminate()
    assert f"Signal 9 (SIGKILL) received by PID {killed}" in log.read_text()
    done = load(last)["optimizer_history"][-1]["num_updates"]
    call("train", data, *flags, "--max-update", done + 1)
    assert load(last)["optimizer_history"][-1]["num_updates"] == done + 1


def die_while_saving(rank: int, port: int, data: Path, folder: Path) -> None:
    """Train; process 1 is killed in its second save, with half of its experts' file written."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
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
    ranks = ["--distributed-world-size", 2, "--distributed-no-spawn", "--distributed-rank", rank]
    ranks += ["--distributed-init-method", "tcp://unused", "--cpu"]
    call("train", data, *TINY_MOE, *EACH_UPDATE, *ranks, "--save-dir", folder)


EACH_UPDATE = ["--no-epoch-checkpoints", "--save-interval-updates", 1, "--max-update", 4]


@pytest.mark.timeout(280)
def test_a_process_killed_while_saving_leaves_the_save_before(data: Path, tmp_path: Path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=die_while_saving, args=(rank, port, data, tmp_path), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    ranks[1].join(200)
    assert ranks[1].exitcode == -signal.SIGKILL
    ranks[0].join(STOPPED_WITHIN)
    assert ranks[0].exitcode == 1  # it stops, and does not wait
    last = tmp_path / "checkpoint_last.pt"
    assert list(tmp_path.glob("experts-*.tmp"))
    state = load(last)
    assert state["optimizer_history"][-1]["num_updates"] == 1
    restore_experts(last, state)
    call("train", data, *TINY_MOE, *EACH_UPDATE, "--save-dir", tmp_path)
    assert load(last)["optimizer_history"][-1]["num_updates"] == 4


def test_a_copy_that_is_cut_short_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch):
    old, new = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint1.pt"
    old.write_text("old")
    new.write_text("new")

    def copy_half(source: str, destination: str) -> None:
        Path(destination).write_text("n")
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(shutil, "copyfile", copy_half)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_text() == "old"
    assert PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_text() == "new"
