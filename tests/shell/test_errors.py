"""A user's mistake is reported in one message; a bug in this project shows its traceback."""

import sys

import pytest
import torch
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigIndexError, MissingMandatoryValue, ValidationError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from nmt_moe import compat
from nmt_moe.compat.errors import (
    end_in_one_message,
    explain,
    is_fairseq_command,
    leave_for_torchrun,
)
from tests.support.stock_model import damage, run_apart, training


def test_resuming_from_a_truncated_checkpoint_ends_in_one_message(stock):
    name = damage(stock, "truncated")
    arguments = training(stock, "resumed", 3, f"--restore-file={name}")
    result = run_apart(stock, "fairseq_cli.train", *arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"fairseq-train: error: `{name}`" in result.stderr
    assert not list((stock / "resumed").glob("*.pt"))


def raised(error: Exception, module: str) -> Exception:
    """Return the error as if a function in `module` had raised it."""
    try:
        exec("raise error", {"__name__": module, "error": error})
    except Exception as caught:
        return caught
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "module", "message"),
    [
        (ValueError("k > n"), "nmt_moe.moe.config", "k > n"),
        (ValueError("a bug"), "fairseq.trainer", None),
        (FloatingPointError("loss is NaN"), "nmt_moe.criterions", "loss is NaN"),
        (OSError("no such file"), "fairseq.data", "no such file"),
        (
            FileExistsError("bin/dict.txt"),
            "fairseq_cli.preprocess",
            "`bin/dict.txt` already exists. Remove it or specify a different folder.",
        ),
        (
            FileExistsError(17, "File exists", "bin"),
            "fairseq_cli.preprocess",
            "`bin`: File exists. Check the path.",
        ),
        (Exception("Sample #3 is invalid"), "fairseq.tasks", "Sample #3 is invalid"),
        (Exception("a bug"), "somewhere", None),
        (
            RuntimeError("sendBytes failed: Broken pipe"),
            "torch.distributed",
            "another process in this training run has ended; see its error message for the cause",
        ),
        (
            torch.distributed.DistNetworkError("Failed to recv, got 0 bytes."),
            "torch.distributed",
            "another process in this training run has ended; see its error message for the cause",
        ),
        (AssertionError("ours"), "nmt_moe.moe", None),
        (ValueError(), "nmt_moe.moe", None),
    ],
)
def test_users_errors_are_explained_and_others_are_not(error, module, message):
    assert explain(raised(error, module)) == message


def test_an_option_that_its_group_needs_is_named():
    config = OmegaConf.structured(SentencepieceConfig())
    with pytest.raises(MissingMandatoryValue) as caught:
        config.sentencepiece_model  # noqa: B018
    assert explain(caught.value).startswith("`--sentencepiece-model` must be")
    with pytest.raises(ValidationError) as caught:
        config.sentencepiece_alpha = "x"
    with pytest.raises(ConfigIndexError) as index:
        OmegaConf.create({"lr": []}).lr[0]  # noqa: B018
    assert "option `lr[0]` cannot be used: list index out of range" in explain(index.value)
    error = ConfigCompositionException("Error merging override bpe.sentencepiece_alpha=x")
    error.__cause__ = caught.value
    assert "sentencepiece_alpha=x: Value 'x' of type 'str' could not" in explain(error)


def test_torchruns_report_ends_with_the_message(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    leave_for_torchrun("`--lr` must be a number")
    failure = ProcessFailure(0, 7, 1, str(tmp_path / "error.json"))
    report = ChildFailedError("train", {0: failure}).format_msg()
    assert "traceback : `--lr` must be a number" in report


def test_a_misspelt_override_causes_a_warning(caplog):
    cfg = OmegaConf.create({"model": {"_name": "lstm", "dropout": 0.1}})
    compat.checkpoints._warn_of_unknown_settings(cfg, {"dropout": 0.2, "dorpout": 0.2})
    assert [record.args for record in caplog.records] == [("dorpout",)]


def test_only_commands_of_fairseq_lose_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/some-program"])
    hook = sys.excepthook
    end_in_one_message()
    assert sys.excepthook is hook
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fairseq-train"])
    assert is_fairseq_command()
