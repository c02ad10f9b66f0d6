"""A process of a training dies: the others stop, and its checkpoints are whole."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fairseq.file_io import PathManager
from support.commands import PLUGIN, call
from support.training import TINY_MOE, load

from nmt_moe import plugin

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
