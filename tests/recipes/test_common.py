"""Code that the recipes share to read fairseq's logs and to check the settings of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from recipes import logs

COMMON = Path(__file__).parents[2] / "recipes" / "common.sh"


def call(function, *arguments):
    script = f'set -euo pipefail; source "{COMMON}"; {function} "$@"'
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})


def read_log(command, log):
    return CliRunner().invoke(logs.main, [command, str(log)])


def test_the_last_loss_of_a_log_is_read(tmp_path):
    log = tmp_path / "log"
    entries = "Evaluated 8 tokens in 0.1s\nLoss (base 2): 3.0000, Perplexity: 8.00\n"
    log.write_text(entries + "x | Evaluated 1,008 tokens in 1s\nx | Loss (base 2): 4.125, Perp")
    assert read_log("loss", log).stdout == "4.125 1008\n"


def test_an_incomplete_log_is_refused(tmp_path):
    log = tmp_path / "log"
    log.write_text("Evaluated 8 tokens\n")
    for command, what in (("loss", "loss from fairseq-eval-lm"), ("perplexities", "perplexity")):
        done = read_log(command, log)
        assert done.exit_code == 1
        assert f"error: `{log}` has no {what}" in done.stderr
    for last in (
        "Evaluated 9 tokens\nLoss (base 2): nan, Perplexity: nan\n",
        "Evaluated 9 tokens\n",
    ):
        log.write_text("Evaluated 8 tokens\nLoss (base 2): 3.0, Perplexity: 8.00\n" + last)
        assert "no loss from fairseq-eval-lm" in read_log("loss", log).stderr


def test_perplexities_of_all_directions_are_read(tmp_path):
    log = tmp_path / "log"
    log.write_text('x | {"valid_ppl": "3", "valid_en-fr_ppl": "2.5", "valid_fr-en_ppl": "4"}\n')
    assert read_log("perplexities", log).stdout == "en-fr 2.5\nfr-en 4\n"


# fairseq-train writes log lines like these with `--log-format json`.
TRAINING = """\
t | INFO | fairseq_cli.train | {'_name': None, 'common': {'ppl': 1}}
t | INFO | train_inner | {"epoch": 1, "update": 0.5, "nll_loss": "4", "ppl": "16.1", "wps": "120", \
"moe_cv_load": "0.25", "num_updates": "20", "lr": "1e-05"}
t | INFO | valid | {"epoch": 1, "valid_nll_loss": "5", "valid_ppl": "inf", "valid_wps": "9", \
"valid_num_updates": "20", "valid_best_loss": "5"}
t | INFO | train_inner | {"epoch": 1, "update": 1, "ppl": "2", "wps": "7", "num_updates": 40}
t | INFO | train | {"epoch": 1, "train_ppl": "9.9", "train_num_updates": "40"}
"""


def test_training_shows_a_short_line_for_each_report_and_keeps_everything_in_the_log(tmp_path):
    (tmp_path / "lines").write_text(TRAINING)
    log = tmp_path / "log"
    log.write_text("before\n")
    done = call("train_logged", log, "cat", tmp_path / "lines")
    assert done.stdout.splitlines() == [
        "        num_updates 20  ppl 16.1  wps 120  moe_cv_load 0.25",
        "valid:  num_updates 20  ppl inf",
        "        num_updates 40  ppl 2  wps 7",
    ]
    assert log.read_text() == "before\n" + TRAINING


def test_training_that_fails_shows_the_end_of_its_log(tmp_path):
    done = call("train_logged", tmp_path / "log", "bash", "-c", "echo reason >&2; exit 3")
    assert done.returncode == 1
    assert done.stderr.startswith("reason\nerror: training failed; the whole log is ")


@pytest.mark.parametrize("result", ["checkpoint_last.pt", "runs/a/done"])
def test_settings_are_fixed_once_a_checkpoint_exists(result, tmp_path):
    folder = tmp_path / "run"
    assert call("keep_settings", folder, "rate 1").returncode == 0
    # If training was refused or stopped before its first checkpoint, settings may still change.
    assert call("keep_settings", folder, "rate 2").returncode == 0
    (folder / result).parent.mkdir(parents=True, exist_ok=True)
    (folder / result).touch()
    assert call("keep_settings", folder, "rate 2").returncode == 0
    done = call("keep_settings", folder, "rate 3", "WORK")
    assert done.returncode == 1
    assert "< rate 2\n---\n> rate 3\n" in done.stderr
    assert f"error: {folder} was trained with different settings or a different text" in done.stderr
    assert "Choose another WORK, or remove it." in done.stderr
    assert (folder / "settings").read_text() == "rate 2\n"


def test_a_number_above_0_is_a_decimal_number():
    for value in ("1", "0.01", ".5", "1e-3", "2.5E+1"):
        assert call(f"N={value}; require_positive N").returncode == 0, value
    for value in ("", "0", "0.0", "0e5", "-1", "1.", "1e", "x", "1,2"):
        done = call(f"N='{value}'; require_positive N")
        assert f"error: N must be a number above 0, but is '{value}'" in done.stderr
        assert done.returncode == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("SEED=x", "SEED must be a whole number of at least 0"),
        ("SEED=", "SEED must be a whole number of at least 0"),
        ("LEARNING_RATE=-1", "LEARNING_RATE must be a number above 0"),
        ("UPDATES=0", "UPDATES must be a whole number of at least 1"),
        ("CLIP_NORM=nan", "CLIP_NORM must be a number of at least 0"),
        ("DROPOUT=1", "DROPOUT must be at least 0 and below 1"),
        ("DEVICE=tpu", "DEVICE must be one of auto, cpu, cuda"),
        ("UPDATES=4; AVERAGE=3; SAVE_INTERVAL=2", "AVERAGE x SAVE_INTERVAL = 6 must not exceed"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(setting, message):
    done = call(f"{setting}; check_settings")
    assert done.returncode == 1
    assert message in done.stderr


def test_every_script_checks_settings_before_it_needs_an_environment():
    scripts = [path for path in COMMON.parent.glob("*/*.sh") if path.name != "settings.sh"]
    texts = [path.read_text() for path in scripts]
    checking = [text for text in texts if "\nuse_environment" in text]
    assert len(checking) > 10
    for text in checking:
        assert text.index("\ncheck_settings\n") < text.index("\nuse_environment")


def test_a_log_with_other_settings_is_set_aside(tmp_path):
    folder = tmp_path / "run"
    call("keep_settings", folder, "rate 1")
    (folder / "train.log").write_text("old\n")
    call("keep_settings", folder, "rate 1")
    assert (folder / "train.log").exists()
    assert call("keep_settings", folder, "rate 2").returncode == 0
    (aside,) = folder.glob("train*.log")
    assert aside.name != "train.log"
    assert aside.read_text() == "old\n"


def test_an_old_bash_is_refused_with_the_version_needed(tmp_path):
    copy = tmp_path / "common.sh"
    copy.write_text(COMMON.read_text().replace("BASH_VERSINFO", "FAKE"))
    script = f'FAKE=(3 2); source "{copy}"; echo reached'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the recipes need bash 4.4 or newer" in done.stderr
    assert "brew install bash" in done.stderr


def test_a_failure_within_a_substitution_ends_the_script():
    done = call('f() { false; echo reached; }; x=$(f); echo "$x"')
    assert (done.returncode, done.stdout) == (1, "")
