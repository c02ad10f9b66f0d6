"""What recipes share: reading the logs of fairseq."""

import subprocess
from pathlib import Path

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
