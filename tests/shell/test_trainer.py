"""The settings that the trainer refuses, its warnings, and the files that it leaves behind."""

import copy
import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer

from nmt_moe import plugin
from nmt_moe.checkpoints import files
from nmt_moe.trainer import ExpertParallelTrainer
from nmt_moe.trainer.install import _building
from nmt_moe.trainer.save_folder import LOCK, FolderLock, warn_of_little_room
from tests.support import programs
from tests.support.commands import PLUGIN, call
from tests.support.training import TINY_DENSE, TINY_MOE, load, without_updates

plugin.register()

FEW = ["--no-epoch-checkpoints", "--max-update", 2]
LAST = "checkpoint_last.pt"


def num_updates(path: Path) -> int:
    return load(path)["optimizer_history"][-1]["num_updates"]


@pytest.fixture(scope="module")
def within_epoch(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stop a training run after 2 of the 6 updates in an epoch, and return its folder."""
    folder = tmp_path_factory.mktemp("within")
    call("train", data, *TINY_MOE, *FEW, "--save-dir", folder)
    return folder


def test_training_does_not_compute_with_denormal_numbers():
    build = _building(lambda *_: None)
    numbers = torch.full((100_000,), 1e-39)
    build({}, None, from_checkpoint=True)
    assert (numbers * 0.9).count_nonzero() == len(numbers)
    build({}, None)
    assert (numbers * 0.9).count_nonzero() == 0


# Refused before the first update


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", -1], "`--lr` must be a number of at least 0, but is -1"),
        (["--clip-norm", "nan"], "`--clip-norm` must be a number of at least 0, but is nan"),
        (["--clip-norm", -1], "`--clip-norm` must be a number of at least 0, but is -1"),
        (["--label-smoothing", 1.5], "`--label-smoothing` must be from 0 to 1, but is 1.5"),
        (["--update-freq", 0], "`--update-freq` must be at least 1, but is 0"),
        (["--log-interval", 0], "`--log-interval` must be at least 1, but is 0"),
        (["--validate-interval", 0], "`--validate-interval` must be at least 1, but is 0"),
        (["--batch-size", -1], "`--batch-size` must be at least 1, but is -1"),
        (["--weight-decay", -1], "`--weight-decay` must be at least 0, but is -1"),
        (["--adam-betas", "(0.9,1.5)"], "`--adam-betas` must be two numbers of at least 0"),
        (["--adam-eps", "nan"], "`--adam-eps` must be a finite number, but is nan"),
        (["--importance-weight", "inf"], "`--importance-weight` must be a finite number"),
        (["--warmup-init-lr", -1], "`--warmup-init-lr` must be at least 0, but is -1"),
        (["--restore-file", "typo.pt"], "`--restore-file` must name .* no file `typo.pt`"),
        (
            ["--criterion", "label_smoothed_cross_entropy"],
            "`--criterion` must be moe_label_smoothed.* but is label_smoothed_cross_entropy, which",
        ),
    ],
)
def test_unusable_training_settings_are_refused(flags, message, data: Path, tmp_path: Path):
    with without_updates(), pytest.raises(ValueError, match=message):
        call("train", data, *TINY_MOE, *FEW, *flags, "--save-dir", tmp_path)


def test_other_criteria_train_dense_models_and_models_without_balance_losses(
    data: Path, tmp_path: Path
):
    plain = ["--criterion", "label_smoothed_cross_entropy", *FEW, "--save-dir"]
    weights = ["--importance-weight", 0, "--load-weight", 0]
    call("train", data, *TINY_DENSE, *plain, tmp_path / "dense")
    call("train", data, *TINY_MOE, *weights, *plain, tmp_path / "moe")
    assert num_updates(tmp_path / "moe" / LAST) == num_updates(tmp_path / "dense" / LAST) == 2


def test_a_save_folder_that_cannot_be_written_to_is_named(data: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with without_updates(), pytest.raises(ValueError, match="`--save-dir` must be a folder wh"):
        call("train", data, *TINY_MOE, *FEW, "--save-dir", tmp_path / "file" / "below")


def test_checking_a_save_folder_leaves_all_files_as_they_are(tmp_path: Path):
    (tmp_path / "dummy").write_text("mine")
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["dummy"]
    assert (tmp_path / "dummy").read_text() == "mine"


def test_a_validation_set_without_targets_is_refused():
    trainer = ExpertParallelTrainer.__new__(ExpertParallelTrainer)
    trainer.task = SimpleNamespace(dataset=lambda _: SimpleNamespace(tgt=None))
    with pytest.raises(ValueError, match="validation set `valid` must have a target side"):
        trainer.get_valid_iterator("valid")


def test_a_disk_without_room_for_two_checkpoints_causes_a_warning(tmp_path, monkeypatch, caplog):
    model = torch.nn.Linear(1000, 250, bias=False)  # 1 MB, or 3 MB with Adam's two moments
    for free, is_warned in ((5_999_999, True), (6_000_000, False)):
        caplog.clear()
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        warn_of_little_room(tmp_path, model, with_optimizer=True)
        assert ("two checkpoints of this model may need 6.0 MB" in caplog.text) == is_warned


HOLD = """
import sys
from pathlib import Path
from nmt_moe.trainer import ExpertParallelTrainer
from nmt_moe.trainer.install import _building
from nmt_moe.trainer.save_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_training_run_with_the_same_folder_is_refused_while_the_first_runs(
    data: Path, tmp_path: Path
):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"locked\n"
        match = rf"but process {holder.pid} on .* writes to `{tmp_path}`"
        with without_updates(), pytest.raises(ValueError, match=match):
            call("train", data, *TINY_MOE, *FEW, "--save-dir", tmp_path)
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / LOCK).exists()  # the file remains, but locks nothing
    FolderLock(tmp_path)


def test_a_disk_without_locks_causes_a_warning_and_training_works(tmp_path, monkeypatch, caplog):
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    FolderLock(tmp_path)
    assert f"the disk of {tmp_path} does not support locks (No locks available)" in caplog.text


# Resumed


@pytest.mark.parametrize("is_early", [False, True])
def test_the_middle_of_an_epoch_is_not_resumed_with_other_batches(
    is_early, data: Path, within_epoch: Path, tmp_path: Path
):
    state = load(within_epoch / LAST)
    if is_early:
        del state["extra_state"]["train_batches"]
    torch.save(state, tmp_path / LAST)
    flags = [*TINY_MOE, *FEW, "--max-update", 3, "--save-dir", tmp_path]
    match = "middle of epoch 1.*`--batch-size` was 16 and is now 8"
    with without_updates(), pytest.raises(ValueError, match=match):
        call("train", data, *flags, "--batch-size", 8)
    call("train", data, *flags)
    assert num_updates(tmp_path / LAST) == 3


def test_the_middle_of_an_epoch_is_not_resumed_with_another_seed(
    data: Path, within_epoch: Path, tmp_path: Path
):
    torch.save(load(within_epoch / LAST), tmp_path / LAST)
    flags = [*TINY_MOE, *FEW, "--max-update", 3, "--save-dir", tmp_path, "--seed", 4]
    with without_updates(), pytest.raises(ValueError, match="the data or the seed is not the same"):
        call("train", data, *flags)
    call("train", data, *flags, "--reset-dataloader")


def test_finished_training_makes_no_update(data: Path, within_epoch: Path):
    before = (within_epoch / LAST).read_bytes()
    with without_updates():
        done = call("train", data, *TINY_MOE, *FEW, "--save-dir", within_epoch)
    assert "nothing to train: 2 updates are done" in done.text
    assert (within_epoch / LAST).read_bytes() == before


# Saved


def test_a_save_at_the_end_of_an_epoch_is_written(data: Path, tmp_path: Path):
    flags = ["--save-interval-updates", 6, "--keep-interval-updates", 5, "--max-epoch", 2]
    call("train", data, *TINY_MOE, *flags, "--no-epoch-checkpoints", "--save-dir", tmp_path)
    states = {name: load(tmp_path / name) for name in ("checkpoint_1_6.pt", "checkpoint_2_12.pt")}
    epochs = [state["extra_state"]["train_iterator"]["epoch"] for state in states.values()]
    assert epochs == [2, 3]


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch):
    path, save, calls = tmp_path / LAST, torch.save, []

    def save_half(content, file) -> None:
        calls.append(1)
        if len(calls) <= failures:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_half)
    monkeypatch.setattr(files, "PAUSE", 0)
    failures = 1
    checkpoint_utils.torch_persistent_save({"whole": 1}, str(path))
    assert torch.load(path) == {"whole": 1}
    calls.clear()
    failures = 9
    match = f"cannot write `{path}`: No space left on device. It needs 4.0 MB, and .* MB are free"
    with pytest.raises(OSError, match=match):
        checkpoint_utils.torch_persistent_save({"whole": torch.zeros(1_000_000)}, str(path))
    assert len(calls) == files.ATTEMPTS
    assert torch.load(path) == {"whole": 1}
    assert [file.name for file in tmp_path.iterdir()] == [LAST]


def test_training_removes_the_files_of_failed_saves(data: Path, tmp_path: Path, monkeypatch):
    left = [tmp_path / name for name in ("checkpoint_last.pt.tmp", "experts-0a-0-4.pt")]
    for path in left:
        path.write_bytes(b"half")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    done = call("train", data, *TINY_MOE, "--max-update", 1, "--save-dir", tmp_path)
    assert f"`--save-dir` {tmp_path} has 0.0 MB free" in done.text
    assert not any(path.exists() for path in left)
    assert (tmp_path / LAST).exists()


def test_no_link_is_followed_when_a_checkpoint_is_written_or_copied(tmp_path: Path):
    other, path, copied = (tmp_path / name for name in ("other", LAST, "checkpoint_best.pt"))
    other.write_text("mine")
    for target in (path, copied):
        target.with_name(target.name + ".tmp").symlink_to(other)
    checkpoint_utils.torch_persistent_save({"whole": 1}, str(path))
    PathManager.copy(str(path), str(copied), overwrite=True)
    assert other.read_text() == "mine"
    assert torch.load(copied) == {"whole": 1}


def test_a_nan_in_validation_is_never_the_best(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)
    epoch = SimpleNamespace(epoch=1, end_of_epoch=lambda: True, state_dict=dict)
    trainer = SimpleNamespace(
        data_parallel_rank=0,
        should_save_checkpoint_on_current_rank=True,
        checkpoint_suffix="",
        task=None,
        get_num_updates=lambda: 6,
        consolidate_optimizer=lambda: None,
        saving_experts=nullcontext,
        save_checkpoint=lambda path, state: Path(path).write_text(json.dumps(state)),
    )
    flags = {
        "save_dir": str(tmp_path),
        "no_save": False,
        "maximize_best_checkpoint_metric": False,
        "no_epoch_checkpoints": True,
        "save_interval": 1,
        "save_interval_updates": 0,
        "keep_interval_updates": -1,
        "keep_last_epochs": -1,
        "keep_best_checkpoints": -1,
        "no_last_checkpoints": False,
        "write_checkpoints_asynchronously": False,
        "best_checkpoint_metric": "loss",
    }
    for loss in (3.0, math.nan, 4.0):
        checkpoint_utils.save_checkpoint(SimpleNamespace(**flags), trainer, epoch, loss)
        assert checkpoint_utils.save_checkpoint.best == 3.0
        assert '"val_loss": 3.0' in (tmp_path / "checkpoint_best.pt").read_text()


# Warnings


def test_a_gate_that_cannot_learn_is_reported_at_the_start(data: Path, tmp_path: Path):
    weights = ["--importance-weight", 0, "--load-weight", 0]
    done = call("train", data, *TINY_MOE, *FEW, "--top-k", 1, *weights, "--save-dir", tmp_path)
    assert "can only learn from the load loss" in done.text
    done = call("train", data, *TINY_MOE, *FEW, *weights, "--save-dir", tmp_path / "two")
    assert "can only learn from the load loss" not in done.text


def test_an_exploding_loss_causes_one_warning(data: Path, tmp_path: Path):
    flags = ["--lr", 1e4, "--clip-norm", 0, "--no-save", "--warmup-updates", 0, "--max-update", 6]
    done = call("train", data, *TINY_DENSE, *flags, "--save-dir", tmp_path)
    assert len(re.findall("training is diverging", done.text)) == 1


# Stopped


@pytest.mark.timeout(280)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_run_prints_one_line_that_names_the_last_checkpoint(
    number, data: Path, tmp_path: Path
):
    command = [programs.python(), "-m", "fairseq_cli.train", data, "--user-dir", PLUGIN]
    command += TINY_MOE
    command += ["--save-interval-updates", 1, "--no-epoch-checkpoints", "--save-dir", tmp_path]
    command += ["--tensorboard-logdir", tmp_path / "board", "--log-interval", 1]
    with (tmp_path / "log").open("wb") as log:
        training = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PLUGIN.parent)},
            cwd=tmp_path,
        )
    last = tmp_path / LAST
    try:
        while not last.exists():
            assert training.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        training.send_signal(number)
        assert training.wait(60) == 128 + number
    finally:
        training.kill()
    text = (tmp_path / "log").read_text()
    assert f"fairseq-train: stopped by {number.name}; `{last}` is " in text
    assert "Traceback" not in text
    assert num_updates(last) >= 1
    # TensorBoard's thread writes every two minutes, but waiting events are not lost.
    assert any(b"ppl" in path.read_bytes() for path in tmp_path.glob("board/train_inner/*"))


STOPPABLE = """
import sys, time
from types import SimpleNamespace
from nmt_moe.compat import stops
sys.argv[0] = "fairseq-train"
def main(cfg):
    print("ready", flush=True)
    time.sleep(300)
cfg = SimpleNamespace(checkpoint=SimpleNamespace(save_dir="."))
stops._explaining_stops(lambda cfg, main: main(cfg))(cfg, main)
"""


@pytest.mark.timeout(280)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_run_can_be_stopped_if_nothing_reads_its_output(number):
    training = subprocess.Popen(
        [sys.executable, "-c", STOPPABLE],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(PLUGIN.parent)},
    )
    try:
        assert b"ready\n" in training.stdout  # imports may print lines before it
        training.stdout.close()
        training.send_signal(number)
        assert training.wait(60) == 128 + number
    finally:
        training.kill()


RANK = """
import time
from nmt_moe.compat import stops
print("ready", flush=True)
stops._watching_launcher(lambda cfg, main: main(cfg))(None, lambda _: time.sleep(300))
"""
LAUNCHER = """
import os, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(rank.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.timeout(280)
def test_a_rank_stops_once_its_launcher_is_gone():
    torchrun = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        stdout=subprocess.PIPE,
        env={**os.environ, **torchrun, "PYTHONPATH": str(PLUGIN.parent)},
    )
    pid, ready = int(launcher.stdout.readline()), launcher.stdout.readline()
    assert ready == b"ready\n"
    launcher.kill()
    launcher.wait()
    # The pipe is closed only when the rank has ended, too.
    assert launcher.stdout.read() == b""
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_text()


# Exponential moving average, which copies the model


@pytest.mark.parametrize("flags", [TINY_MOE, TINY_DENSE], ids=["moe", "dense"])
def test_a_moving_average_of_the_weights_is_kept(flags, data: Path, tmp_path: Path):
    average = ["--store-ema", "--ema-decay", 0.5, "--ema-fp32"]
    call("train", data, *flags, *FEW, *average, "--save-dir", tmp_path)
    state = load(tmp_path / LAST)
    averages = state["extra_state"]["ema"]
    assert averages.keys() == state["model"].keys()
    name = "decoder.output.weight"
    assert not averages[name].equal(state["model"][name])
    assert averages[name].dtype == torch.float32


def test_a_model_in_training_can_be_copied(data: Path, tmp_path: Path, monkeypatch):
    step, copies = Trainer.train_step, []

    def copying_step(self, samples, raise_oom=False):
        result = step(self, samples, raise_oom)
        copies.append(copy.deepcopy(self.get_model()))
        return result

    monkeypatch.setattr(Trainer, "train_step", copying_step)
    call("train", data, *TINY_MOE, *FEW, "--save-dir", tmp_path)
    assert len(copies) == 2
