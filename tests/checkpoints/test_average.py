import argparse
import os

import pytest
import torch
from click.testing import CliRunner

from nmt_moe.checkpoints import average as tool
from nmt_moe.checkpoints import load_checkpoint, read_checkpoint
from nmt_moe.cli import main


def save(path, weight, steps=1, **entries):
    model = {"weight": torch.tensor(weight), "steps": torch.tensor(steps)}
    torch.save({"model": model, "last_optimizer_state": {"big": 1}, **entries}, path)
    return path


def test_the_average_by_hand(tmp_path):
    paths = [save(tmp_path / f"{i}.pt", [i, 10.0 * i], steps=int(i)) for i in (1.0, 2.0, 6.0)]
    tool.average_checkpoints(paths, tmp_path / "average.pt")
    state = read_checkpoint(tmp_path / "average.pt")
    # (1 + 2 + 6) / 3 = 3. Everything except the weights comes from the last checkpoint.
    torch.testing.assert_close(state["model"]["weight"], torch.tensor([3.0, 30.0]))
    assert state["model"]["steps"] == 6
    assert "last_optimizer_state" not in state


def test_half_precision_is_summed_in_full_precision(tmp_path):
    # float16 cannot represent 2049. The average of 2048, 2050, 2050 and 2050 is 2049.5, which is
    # rounded to 2050.
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
    state = read_checkpoint(tmp_path / "average.pt")
    assert state["args"].arch == "lstm"
    assert state["cfg"] == {"task": {"x": 1}}


def with_updates(count):
    return {"optimizer_history": [{"num_updates": count}]}


def test_the_last_checkpoints_are_found_by_updates_whatever_their_names(tmp_path):
    for name, updates in [
        ("checkpoint_9_900.pt", 900),
        ("checkpoint_10_1000.pt", 1000),
        ("checkpoint_1_50.pt", 50),
        ("checkpoint9.pt", 950),
        ("checkpoint_last.pt", 2000),
    ]:
        save(tmp_path / name, [0.0], **with_updates(updates))
    found = [path.name for path in tool.find_last(tmp_path, 3)]
    assert found == ["checkpoint_9_900.pt", "checkpoint9.pt", "checkpoint_10_1000.pt"]
    found = [path.name for path in tool.find_last(tmp_path, 1, upper_bound=960)]
    assert found == ["checkpoint9.pt"]
    found = [path.name for path in tool.find_numbered(tmp_path, tool.BY_UPDATE, 2)]
    assert found == ["checkpoint_9_900.pt", "checkpoint_10_1000.pt"]


@pytest.mark.parametrize(
    ("is_larger_better", "best"), [(False, ["3.2100", "2.9000"]), (True, ["3.2100", "10.0001"])]
)
def test_the_best_checkpoints_are_found_by_their_score(tmp_path, is_larger_better, best):
    cfg = {"checkpoint": {"maximize_best_checkpoint_metric": is_larger_better}}
    for score in ("3.2100", "10.0001", "2.9000"):
        save(tmp_path / f"checkpoint.best_aa-bb_bleu_{score}.pt", [0.0], cfg=cfg)
    found = [path.name for path in tool.find_best(tmp_path, 2)]
    assert found == [f"checkpoint.best_aa-bb_bleu_{score}.pt" for score in best]


def test_too_few_checkpoints_are_refused(tmp_path):
    save(tmp_path / "checkpoint1.pt", [0.0], **with_updates(7))
    with pytest.raises(
        ValueError, match="must contain 5 or more checkpoints of the chosen kind, but contains 1"
    ):
        tool.find_last(tmp_path, 5)


def test_differing_shapes_or_names_are_refused(tmp_path):
    paths = [save(tmp_path / "1.pt", [1.0]), save(tmp_path / "2.pt", [1.0, 2.0])]
    with pytest.raises(ValueError, match=r"2\.pt` and .* differ in names, shapes"):
        tool.average_parameters(paths)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model": {}, "extra": RunsCode(str(tmp_path / "made"))}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt` contains a Python object"):
        read_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    whole = save(tmp_path / "1.pt", [1.0]).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt` .* fairseq checkpoint"):
        read_checkpoint(tmp_path / "cut.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt` has no `model`"):
        read_checkpoint(tmp_path / "list.pt")


def call(*arguments):
    return CliRunner().invoke(main, ["average", *map(str, arguments)])


def test_an_ambiguous_choice_is_refused(tmp_path):
    done = call("--inputs", tmp_path, "--output", tmp_path / "a.pt")
    assert done.exit_code == 1
    assert "one folder and one of `--last`" in done.output


def test_an_existing_output_is_kept(tmp_path):
    paths = [save(tmp_path / f"{i}.pt", [float(i)]) for i in (1, 2)]
    before = paths[0].read_bytes()
    done = call("--inputs", *paths, "--output", paths[0])
    assert (done.exit_code, paths[0].read_bytes()) == (1, before)
    assert "Specify another output, or add `--overwrite`" in done.output
    assert call("--inputs", *paths, "--output", paths[0], "--overwrite").exit_code == 0
    assert load_checkpoint(paths[0])["model"]["weight"].item() == 1.5
