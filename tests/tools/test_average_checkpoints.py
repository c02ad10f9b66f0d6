import argparse
import os
import subprocess
import sys

import pytest
import torch

from tools import average_checkpoints as tool


def save(path, weight, steps=1, **entries):
    model = {"weight": torch.tensor(weight), "steps": torch.tensor(steps)}
    torch.save({"model": model, "last_optimizer_state": {"big": 1}, **entries}, path)
    return path


def test_the_average_by_hand(tmp_path):
    paths = [save(tmp_path / f"{i}.pt", [i, 10.0 * i], steps=int(i)) for i in (1.0, 2.0, 6.0)]
    tool.average_checkpoints(paths, tmp_path / "average.pt")
    state = tool.load(tmp_path / "average.pt")
    # (1 + 2 + 6) / 3 = 3; what is no weight comes from the last checkpoint
    torch.testing.assert_close(state["model"]["weight"], torch.tensor([3.0, 30.0]))
    assert state["model"]["steps"] == 6
    assert "last_optimizer_state" not in state


def test_half_precision_is_summed_in_full(tmp_path):
    # 2048 + 1 is no float16; the average of 2048, 2050, 2050, 2050 is 2049.5, rounded to 2050
    values = [2048.0, 2050.0, 2050.0, 2050.0]
    paths = [tmp_path / f"{i}.pt" for i in range(4)]
    for path, value in zip(paths, values, strict=True):
        torch.save({"model": {"w": torch.tensor([value], dtype=torch.float16)}}, path)
    averaged = tool.average_parameters(paths)["w"]
    assert averaged.dtype == torch.float16
    assert averaged.item() == 2050.0


def test_settings_of_the_last_checkpoint_are_kept(tmp_path):
    path = save(
        tmp_path / "1.pt", [1.0], args=argparse.Namespace(arch="lstm"), cfg={"task": {"x": 1}}
    )
    tool.average_checkpoints([path], tmp_path / "average.pt")
    state = tool.load(tmp_path / "average.pt")
    assert state["args"].arch == "lstm"
    assert state["cfg"] == {"task": {"x": 1}}


def test_the_newest_are_found_by_number_not_by_name(tmp_path):
    for name in [
        "checkpoint_9_900.pt",
        "checkpoint_10_1000.pt",
        "checkpoint_1_50.pt",
        "checkpoint9.pt",
    ]:
        save(tmp_path / name, [0.0])
    save(tmp_path / "checkpoint_last.pt", [0.0])
    found = [path.name for path in tool.find_last(tmp_path, 2)]
    assert found == ["checkpoint_9_900.pt", "checkpoint_10_1000.pt"]


def test_the_newest_epochs_are_found_where_names_have_no_updates(tmp_path):
    for epoch in (2, 10, 9):
        save(tmp_path / f"checkpoint{epoch}.pt", [0.0])
    assert [path.name for path in tool.find_last(tmp_path, 2)] == [
        "checkpoint9.pt",
        "checkpoint10.pt",
    ]


def test_the_best_are_found_by_their_score(tmp_path):
    for score in ("3.2100", "10.0001", "2.9000"):
        save(tmp_path / f"checkpoint.best_loss_{score}.pt", [0.0])
    lowest = [path.name for path in tool.find_best(tmp_path, 2)]
    assert lowest == ["checkpoint.best_loss_2.9000.pt", "checkpoint.best_loss_3.2100.pt"]
    highest = [path.name for path in tool.find_best(tmp_path, 1, is_larger_better=True)]
    assert highest == ["checkpoint.best_loss_10.0001.pt"]


def test_too_few_checkpoints_are_refused(tmp_path):
    save(tmp_path / "checkpoint1.pt", [0.0])
    with pytest.raises(ValueError, match="has 1 checkpoints of that kind, but 5 were asked for"):
        tool.find_last(tmp_path, 5)


def test_other_shapes_or_names_are_refused(tmp_path):
    paths = [save(tmp_path / "1.pt", [1.0]), save(tmp_path / "2.pt", [1.0, 2.0])]
    with pytest.raises(ValueError, match=r"2\.pt: its parameters have other names or shapes"):
        tool.average_parameters(paths)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model": {}, "extra": RunsCode(str(tmp_path / "made"))}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt: cannot be read as a checkpoint"):
        tool.load(tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    whole = save(tmp_path / "1.pt", [1.0]).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt: cannot be read as a checkpoint"):
        tool.load(tmp_path / "cut.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt: has no `model`"):
        tool.load(tmp_path / "list.pt")


def test_the_program_refuses_a_vague_choice(tmp_path):
    command = [sys.executable, tool.__file__, "--output", tmp_path / "a.pt", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: `--folder` needs `--last` or `--best`")
