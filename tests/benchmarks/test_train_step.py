import argparse
import json

import pytest

from benchmarks import train_step

TINY = [
    "--sentences",
    "2",
    "--length",
    "3",
    "--vocab-size",
    "12",
    "--rounds",
    "2",
    "--threads",
    "1",
]
FLAGS = "--model-dim 8 --lstm-hidden-dim 16 --expert-hidden-dim 8 --num-experts 4 --moe-top-k 2"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_for_each_architecture_and_wiring(capsys, tmp_path):
    path = tmp_path / "found.json"
    line = [*TINY, "--no-memory", "--model-flags", FLAGS, "--json", str(path)]
    train_step.main(["--arch", "lstm_moe_gnmt_small", "lstm_gnmt", *line])
    table, groups, note = capsys.readouterr().out.strip().split("\n\n")
    head, _, *rows = table.splitlines()
    assert cells(head) == train_step.COLUMNS
    names = [cells(row)[0] for row in rows]
    assert names == [
        "lstm_moe_gnmt_small/recurrent",
        "lstm_moe_gnmt_small/parallel",
        "lstm_gnmt/recurrent",
        "lstm_gnmt/parallel",
    ]
    assert all(len(cells(row)) == len(train_step.COLUMNS) for row in rows)
    assert [cells(row)[0] for row in groups.splitlines()[2:]] == names
    assert "threads: 1" in note
    found = json.loads(path.read_text())["rows"]
    assert [row["model"] for row in found] == names
    assert all(len(row["step_seconds"]) == len(row["products_seconds"]) == 2 for row in found)
    assert all(row["step_over_products"] > 0 for row in found)


def test_peak_memory_is_measured_in_a_separate_process():
    args = argparse.Namespace(
        sentences=2, length=3, vocab_size=40_000, threads=1, device="cpu", seed=1, model_flags=FLAGS
    )
    name = "lstm_gnmt/parallel"
    # The embedding and the softmax each have 8 x 40,000 weights. Each weight also has a gradient
    # and Adam's two moments.
    least = 2 * 8 * 40_000 * 4 * 4
    assert least < train_step.measure_memory([name], args)[name] < 5 * least


def test_an_unknown_architecture_is_refused(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--arch", "lstm_mow"])
    assert "lstm_mow" in capsys.readouterr().err
