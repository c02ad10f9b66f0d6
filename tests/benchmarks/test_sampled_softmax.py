import json

import pytest

from benchmarks import sampled_softmax

TINY = ["--vocab-size", "50", "60", "--draws", "10", "--tokens", "4", "--dim", "8"]


def test_the_table_has_a_row_for_each_softmax_and_vocabulary(capsys, tmp_path):
    path = tmp_path / "found.json"
    flags = ["--rounds", "2", "--threads", "1", "--json", str(path)]
    sampled_softmax.main([*TINY, *flags])
    table, note = capsys.readouterr().out.strip().split("\n\n")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    assert [row[:2] for row in rows] == [
        ["full", "50"],
        ["10 draws", "50"],
        ["full", "60"],
        ["10 draws", "60"],
    ]
    assert all(row[-1] == "1.0" for row in rows if row[0] == "full")
    assert "4 tokens of width 8" in note
    assert [len(row["seconds"]) for row in json.loads(path.read_text())["rows"]] == [2] * 4


def test_more_draws_than_symbols_are_refused():
    with pytest.raises(SystemExit, match="--draws must be from 1 to the smallest --vocab-size"):
        sampled_softmax.main(["--vocab-size", "50", "--draws", "51"])
