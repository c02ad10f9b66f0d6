import json
import re

import pytest

from benchmarks import expert_parallel

FLAGS = "--model-dim 8 --lstm-hidden-dim 16 --expert-hidden-dim 8 --num-experts 4 --moe-top-k 2"
TINY = ["--sentences", "4", "--length", "3", "--vocab-size", "12", "--rounds", "2"]
TINY += ["--model-flags", FLAGS]


@pytest.mark.timeout(590)
def test_each_number_of_ranks_has_a_row_and_a_single_rank_sends_nothing(capsys, tmp_path):
    path = tmp_path / "found.json"
    expert_parallel.main([*TINY, "--ranks", "1", "2", "--json", str(path)])
    table, note = capsys.readouterr().out.strip().split("\n\n")
    head, _, *lines = table.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == expert_parallel.COLUMNS
    assert len(lines) == 2
    assert "on a total of 4 sentences of 3 tokens" in note
    one, two = json.loads(path.read_text())["rows"]
    assert (one["ranks"], one["experts"], two["ranks"], two["experts"]) == (1, 4, 2, 2)
    # With two ranks, the encoder and the decoder each hold two fewer experts; each expert has two
    # matrices.
    assert one["parameters"] - two["parameters"] == 2 * 2 * 2 * 8 * 8
    assert one["bytes_sent"] == {"exchange": 0, "dense": 0}
    assert one["exchange_share"] == 0
    # In a ring of two, each rank sends every byte once.
    assert two["bytes_sent"]["dense"] == 4 * (two["parameters"] - 2 * 2 * 2 * 8 * 8)
    assert two["bytes_sent"]["exchange"] > 0
    assert 0 < two["exchange_share"] < 1
    for row in (one, two):
        assert len(row["step_seconds"]) == len(row["part_seconds"]["exchange"]) == 2
        assert row["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "3"], "--ranks: 3 must .* divide the 4 sentences and the 4 experts"),
        (["--ranks", "0"], "--ranks: 0 must be at least 1"),
        (["--arch", "lstm_moe_lm_32"], "no translation model lstm_moe_lm_32"),
        (["--device", "cuda"], "--device must be cpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        expert_parallel.main([*TINY, *flags])
    assert re.search(message, capsys.readouterr().err)
