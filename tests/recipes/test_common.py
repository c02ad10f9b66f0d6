"""What recipes share: reading the logs of fairseq, and the settings of a run."""

import subprocess
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[2] / "recipes" / "common.sh"


def call(function, *arguments):
    script = f'set -euo pipefail; source "{COMMON}"; {function} "$@"'
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_loss_of_reads_the_last_result_of_a_log(tmp_path):
    log = tmp_path / "log"
    entries = "Evaluated 8 tokens in 0.1s\nLoss (base 2): 3.0000, Perplexity: 8.00\n"
    log.write_text(entries + "x | Evaluated 1,008 tokens in 1s\nx | Loss (base 2): 4.125, Perp")
    assert call("loss_of", log).stdout == "4.125 1008\n"


def test_loss_of_refuses_a_log_that_breaks_off(tmp_path):
    log = tmp_path / "log"
    log.write_text("Evaluated 8 tokens\n")
    done = call("loss_of", log)
    assert done.returncode == 1
    assert f"error: {log} holds no loss of fairseq-eval-lm" in done.stderr


# As fairseq-train writes them with `--log-format json`.
TRAINING = """\
t | INFO | fairseq_cli.train | {'_name': None, 'common': {'ppl': 1}}
t | INFO | train_inner | {"epoch": 1, "update": 0.5, "nll_loss": "4", "ppl": "16.1", "wps": "120", \
"moe_cv_load": "0.25", "num_updates": "20", "lr": "1e-05"}
t | INFO | valid | {"epoch": 1, "valid_nll_loss": "5", "valid_ppl": "inf", "valid_wps": "9", \
"valid_num_updates": "20", "valid_best_loss": "5"}
t | INFO | train_inner | {"epoch": 1, "update": 1, "ppl": "2", "wps": "7", "num_updates": 40}
t | INFO | train | {"epoch": 1, "train_ppl": "9.9", "train_num_updates": "40"}
"""


def test_a_training_shows_a_short_line_of_each_report_and_keeps_all_in_the_log(tmp_path):
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


def test_a_training_that_fails_ends_with_the_end_of_its_log(tmp_path):
    done = call("train_logged", tmp_path / "log", "bash", "-c", "echo reason >&2; exit 3")
    assert done.returncode == 1
    assert done.stderr.startswith("reason\nerror: training failed; the whole log is ")


@pytest.mark.parametrize("result", ["checkpoint_last.pt", "runs/a/done"])
def test_settings_bind_once_there_is_something_trained(result, tmp_path):
    folder = tmp_path / "run"
    assert call("keep_settings", folder, "rate 1").returncode == 0
    # Training was refused, or stopped before its first checkpoint.
    assert call("keep_settings", folder, "rate 2").returncode == 0
    (folder / result).parent.mkdir(parents=True, exist_ok=True)
    (folder / result).touch()
    assert call("keep_settings", folder, "rate 2").returncode == 0
    done = call("keep_settings", folder, "rate 3", "WORK")
    assert done.returncode == 1
    assert "< rate 2\n---\n> rate 3\n" in done.stderr
    assert f"error: {folder} was trained with other settings or text" in done.stderr
    assert "Choose another WORK, or remove it." in done.stderr
    assert (folder / "settings").read_text() == "rate 2\n"


def test_a_number_above_0_is_a_decimal_number():
    for value in ("1", "0.01", ".5", "1e-3", "2.5E+1"):
        assert call(f"N={value}; require_positive N").returncode == 0, value
    for value in ("", "0", "0.0", "0e5", "-1", "1.", "1e", "x", "1,2"):
        done = call(f"N='{value}'; require_positive N")
        assert f"error: N must be a number above 0, but is '{value}'" in done.stderr
        assert done.returncode == 1
