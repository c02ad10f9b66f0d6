import argparse
import json

import pytest

from benchmarks import timing


def test_competitors_take_turns_after_a_warm_up():
    order = []
    jobs = {name: lambda name=name: order.append(name) for name in "AB"}
    samples = timing.interleave(jobs, rounds=2)
    assert "".join(order) == "AB" * 3
    assert [len(found.seconds) for found in samples.values()] == [2, 2]


def test_parts_are_kept_by_name():
    samples = timing.interleave({"A": lambda: {"forward": 2.0, "backward": 5.0}}, rounds=3)
    assert samples["A"].parts == {"forward": [2.0] * 3, "backward": [5.0] * 3}
    assert samples["A"].part("backward") == 5.0


def test_median_and_spread_by_hand():
    samples = timing.Samples([1.0, 9.0, 2.0])
    assert samples.median == 2.0
    assert samples.spread == 4.0  # (9 - 1) / 2


def test_the_first_column_of_a_table_is_aligned_left():
    table = timing.markdown_table(["model", "ms"], [["a", "1"]])
    assert table.splitlines() == ["| model | ms |", "| --- | --: |", "| a | 1 |"]


def test_peak_memory_grows_by_what_is_held_and_still_counts_what_is_freed():
    before = timing.peak_bytes("cpu")
    above = 2**26
    block = bytearray(b"1") * (before - timing.resident_bytes() + above)
    peak = timing.peak_bytes("cpu")
    assert before + above * 0.9 < peak < before + above * 2
    del block
    assert timing.resident_bytes() < peak - above / 2
    assert timing.peak_bytes("cpu") > peak - above / 10  # the kernel counts in batches of pages


def test_impossible_values_are_refused():
    args = argparse.Namespace(rounds=0, threads=1, device="cpu", seed=1)
    with pytest.raises(SystemExit, match="at least 1, but are 0 and 1"):
        timing.prepare(args)


def test_json_keeps_settings_and_samples(tmp_path):
    path = tmp_path / "found.json"
    args = argparse.Namespace(json=path, rounds=3)
    timing.write_json(path, args, "a machine", [{"model": "A", "seconds": [1.0]}])
    assert json.loads(path.read_text()) == {
        "settings": {"rounds": 3},
        "hardware": "a machine",
        "rows": [{"model": "A", "seconds": [1.0]}],
    }
