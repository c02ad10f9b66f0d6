"""The repairs to fairseq's option parsing."""

import argparse
import re
from pathlib import Path

import pytest

from nmt_moe.compat.errors import explain
from nmt_moe.compat.options import shorten_choices
from tests.support.commands import PLUGIN, call, run
from tests.support.training import TINY_MOE

TRAINED_BY = ["--criterion", "moe_label_smoothed_cross_entropy"]


def test_validate_reads_the_task_from_the_checkpoint(data: Path, checkpoint: Path):
    flags = ["--path", checkpoint, "--batch-size", 8, "--cpu", "--num-workers", 0]
    lines = [
        next(line for line in done.text.splitlines() if "valid on 'valid' subset" in line)
        for done in (
            call("validate", data, *flags),
            call("validate", data, *flags, "--task", "translation"),
        )
    ]
    losses = [line.split("| loss ")[1].split(" |")[0] for line in lines]
    assert losses[0] == losses[1]


def test_libraries_print_no_warnings_at_the_start(data: Path, tmp_path: Path):
    flags = [*TINY_MOE, "--max-update", 1, "--no-save", "--best-checkpoint-metric", "bleu"]
    done = run("train", data, "--user-dir", PLUGIN, *flags, cwd=tmp_path)
    assert "Warning" not in done.text
    # A message before the first update lists all values that validation computes.
    message = "error: `--best-checkpoint-metric` must be one of .*loss.*ppl.*, but is bleu, which"
    assert re.search(message, done.text)
    assert "begin validation on" not in done.text
    assert done.status == 1


def test_for_a_misspelt_architecture_similar_names_are_suggested(data: Path, tmp_path: Path):
    done = run("train", data, "--user-dir", PLUGIN, "--arch", "lstm_moe_gnmt_smal", cwd=tmp_path)
    assert done.status == 2
    assert "'lstm_moe_gnmt_smal': did you mean lstm_moe_gnmt_small or " in done.text
    assert "--max-tokens" not in done.text


def test_help_lists_the_options_of_the_named_architecture_and_schedule(tmp_path: Path):
    flags = ["--arch", "lstm_moe_gnmt", "--lr-scheduler", "warmup_hold_inverse_sqrt", "--help"]
    done = run("train", "--user-dir", PLUGIN, *flags, cwd=tmp_path)
    assert done.status == 0
    for option in ("--max-tokens", "--model-dim", "--top-k", "--hold-updates"):
        assert re.search(rf"^  {option} ", done.text, re.MULTILINE)


def test_if_there_are_many_choices_only_similar_ones_are_named():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--arch", choices=[f"lstm_{name}" for name in "abcdefghijklmno"])
    with pytest.raises(argparse.ArgumentError) as caught:
        parser.parse_args(["--arch", "lstm-a"])
    message = shorten_choices(str(caught.value))
    assert message.startswith("argument --arch: invalid choice: 'lstm-a': did you mean lstm_a or ")
    assert len(message) < 200
    few = "argument --moe-gate: invalid choice: 'x' (choose from 'topk', 'noisy')"
    assert shorten_choices(few) == few


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "lstm_moe_gnmt", "--optimizer", "adam"], "--max-tokens or --batch-size"),
        (["--arch", "lstm_moe_gnmt", "--batch-size", 8], "`--optimizer` must be"),
    ],
)
def test_a_missing_option_is_named_without_a_traceback(
    data: Path, tmp_path: Path, flags: list[object], message: str
):
    with pytest.raises((AssertionError, ValueError)) as caught:
        call("train", data, *flags, *TRAINED_BY, "--cpu", "--save-dir", tmp_path)
    assert message in (explain(caught.value) or "")
