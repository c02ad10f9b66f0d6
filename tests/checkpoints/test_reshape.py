import pytest
import torch
from click.testing import CliRunner

from nmt_moe.checkpoints import EXPERT_NAMES
from nmt_moe.cli import main


def run(*arguments):
    done = CliRunner().invoke(main, ["reshape", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.pt"
    values = torch.arange(16.0).view(4, 2, 2)
    torch.save(
        {
            "model": {"weight": torch.ones(2), "experts": values},
            "extra_state": {EXPERT_NAMES: {0: "experts"}},
            "last_optimizer_state": {"state": {0: {"step": 1, "exp_avg": values + 1}}},
        },
        path,
    )
    return path


def test_split_and_merge_restore_the_checkpoint(whole, tmp_path):
    split, merged = tmp_path / "parts/checkpoint_last.pt", tmp_path / "merged.pt"
    status, _ = run("split", whole, "--files", 2, "--output", split)
    assert status == 0
    assert len(list(split.parent.glob("experts-*.pt"))) == 2
    status, _ = run("merge", split, "--output", merged)
    assert status == 0
    one, other = (torch.load(path, weights_only=True) for path in (whole, merged))
    assert torch.equal(one["model"]["experts"], other["model"]["experts"])
    states = [state["last_optimizer_state"]["state"][0] for state in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])


def test_faults_are_named(whole, tmp_path):
    split = tmp_path / "parts/checkpoint_last.pt"
    status, text = run("split", whole, "--files", 3, "--output", split)
    assert (status, "Use 1, 2 or 4" in text) == (1, True)
    status, text = run("split", whole, "--files", 0, "--output", split)
    assert (status, "`--files` must" in text) == (1, True)
    run("split", whole, "--files", 2, "--output", split)
    part = next(split.parent.glob("experts-*-2-4.pt"))
    part.unlink()
    for arguments in (["verify", split], ["merge", split, "--output", tmp_path / "m.pt"]):
        status, text = run(*arguments)
        assert (status, f"`{part}`, which contains experts 2 to 3" in text) == (1, True)
    status, text = run("verify", whole)  # the file contains no model configuration
    assert (status, "fairseq checkpoint" in text) == (1, True)
    status, text = run("verify", tmp_path / "none.pt")
    assert (status, "none.pt` does not exist" in text) == (1, True)
