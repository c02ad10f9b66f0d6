"""Corrupt, truncated, unfinished and hostile checkpoints are read correctly or refused."""

import errno
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings

from nmt_moe.checkpoints import MANIFEST, load_checkpoint, read_checkpoint, remove_unused_files
from nmt_moe.checkpoints.average import average_checkpoints
from nmt_moe.checkpoints.reshape import split_checkpoint
from nmt_moe.cli import main
from tests.checkpoints import test_expert_files as expert_files
from tests.support.training import assert_same_bits

LAST = "checkpoint_last.pt"


def amounts(few: int, many: int) -> Any:
    """Repeat a test a few times in the default run and many times in the slow one."""
    return pytest.mark.parametrize("rounds", [few, pytest.param(many, marks=pytest.mark.slow)])


def save(folder: Path, shift: float = 0.0) -> Path:
    """Write a checkpoint with three expert files."""
    state = expert_files.whole_state()
    state["model"]["embed"] += shift
    split_checkpoint(state, folder / LAST, 3)
    remove_unused_files(folder)
    return folder / LAST


def assert_right_or_refused(path: Path, expected: dict[str, Any], change: str) -> bool:
    """Return whether a changed checkpoint is refused; check the message or the loaded values."""
    try:
        state = load_checkpoint(path)
    except ValueError as error:
        message = str(error)
    else:
        assert_same_bits(expected, state, change)
        return False
    assert str(path.parent) in message, change
    return True


@amounts(60, 4000)
def test_flipped_bits_are_noticed_wherever_they_count(rounds: int, tmp_path: Path):
    path, chance, refused = save(tmp_path), random.Random(rounds), 0
    expected, files = load_checkpoint(path), sorted(tmp_path.glob("*.pt"))
    for _ in range(rounds):
        file = chance.choice(files)
        whole = file.read_bytes()
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        refused += assert_right_or_refused(path, expected, f"byte {place} of {file.name}")
        file.write_bytes(whole)
    assert refused > rounds / 2  # other flips are in gaps between the parts of a zip file


@amounts(60, 2000)
def test_truncated_files_are_refused(rounds: int, tmp_path: Path):
    path, chance = save(tmp_path), random.Random(rounds)
    expected, files = load_checkpoint(path), sorted(tmp_path.glob("*.pt"))
    for _ in range(rounds):
        file = chance.choice(files)
        whole = file.read_bytes()
        length = chance.randrange(len(whole))
        file.write_bytes(whole[:length])
        assert assert_right_or_refused(path, expected, f"{file.name} cut to {length} bytes")
        file.write_bytes(whole)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit the size of files to imitate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def merge(path: Path) -> Path:
    output = path.with_name("whole.pt")
    done = CliRunner().invoke(main, ["reshape", "merge", str(path), "--output", str(output)])
    if done.exit_code:
        raise OSError(errno.EFBIG, done.output)
    return output


def average(path: Path) -> Path:
    output = path.with_name("average.pt")
    average_checkpoints([path], output)
    return output


def save_again(path: Path) -> Path:
    return save(path.parent, shift=1.0)


@pytest.mark.parametrize("write", [save_again, merge, average])
@amounts(8, 300)
def test_a_full_disk_leaves_existing_files_intact(
    write: Callable[[Path], Path], rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("nmt_moe.checkpoints.files.PAUSE", 0)
    path = save(tmp_path)
    output = write(path)
    size, before = output.stat().st_size, load_checkpoint(path)
    if output != path:
        output.unlink()
    message = r"cannot write `.*\.pt`: File too large\. It needs .* MB"
    for number in range(rounds):
        with files_of_at_most(number * size // rounds), pytest.raises(OSError, match=message):
            write(path)
        assert_same_bits(before, load_checkpoint(path), str(number))
        remove_unused_files(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {
            LAST,
            *(entry["name"] for entry in read_checkpoint(path)[MANIFEST]["files"]),
        }
    load_checkpoint(write(path))


@pytest.mark.slow
def test_thousands_of_hostile_manifests_are_refused():
    check = expert_files.test_any_malformed_manifest_raises_a_value_error_that_names_the_checkpoint
    often = settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
    often(given(manifest=expert_files.MANIFESTS)(check.hypothesis.inner_test))()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_single_value_that_is_not_finite_is_named(value: float, tmp_path: Path):
    tensors = {
        r"model\['embed'\]": lambda state: state["model"]["embed"],
        r"last_optimizer_state.*\[0\].*'exp_avg'": lambda state: state["last_optimizer_state"][
            "state"
        ][0]["exp_avg"],
    }
    for name, find in tensors.items():
        state = expert_files.whole_state()
        find(state)[1] = value
        torch.save(state, tmp_path / LAST)
        with pytest.raises(ValueError, match=rf"{LAST}` has NaN or infinities in {name}"):
            read_checkpoint(tmp_path / LAST)


def test_endlessly_nested_containers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nmt_moe.checkpoints.files.MAX_VALUES", 1000)
    nest: Any = {}
    for _ in range(100):
        nest = {"model": nest}
    many = [{}] * 1000
    for content in (nest, many, [many] * 1000):
        torch.save({"model": {}, "extra_state": content}, tmp_path / LAST)
        with pytest.raises(ValueError, match="nested too deeply or have too many"):
            read_checkpoint(tmp_path / LAST)
