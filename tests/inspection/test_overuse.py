"""Counts, intervals, contexts and pairs of experts, compared with their definitions."""

import math
import random

import pytest
import torch

from nmt_moe.inspection.contexts import TopContexts
from nmt_moe.inspection.overuse import MIN_COUNT, FeatureCounts, find_overuse, wilson_interval
from nmt_moe.inspection.pairs import compare_pairs, expected_pairs, load_overlap
from nmt_moe.inspection.tokens import classes_of, context_of, frequency_band
from nmt_moe.inspection.usage import ExpertUsage


def test_wilson_interval_by_hand():
    # For 8 of 10 at z = 2, the interval is centred on (0.8 + 0.2) / 1.4 and extends
    # 2 sqrt(0.016 + 0.01) / 1.4 to either side.
    low, high = wilson_interval(8, 10, 2.0)
    assert low == pytest.approx((1.0 - 2 * math.sqrt(0.026)) / 1.4)
    assert high == pytest.approx((1.0 + 2 * math.sqrt(0.026)) / 1.4)
    assert wilson_interval(0, 10, 2.0)[0] == 0.0
    assert wilson_interval(10, 10, 2.0)[1] == 1.0
    assert wilson_interval(0, 0, 2.0) == (0.0, 1.0)


def test_counts_match_those_of_a_plain_loop():
    chance = random.Random(3)
    features = [chance.choices("abcde", k=chance.randint(0, 3)) for _ in range(200)]
    features = [sorted(set(names)) for names in features]
    # The number 4 marks an empty slot.
    expert_ids = torch.tensor([[*chance.sample(range(5), 2)] for _ in features])
    counts = FeatureCounts(4)
    for first in range(0, 200, 30):
        counts.add(features[first : first + 30], expert_ids[first : first + 30])
    for name in "abcde":
        number = counts.names.index(name)
        rows = [row for row, names in enumerate(features) if name in names]
        assert counts.totals[number] == len(rows)
        for expert in range(4):
            uses = sum(expert in expert_ids[row].tolist() for row in rows)
            assert counts.uses[number * 4 + expert] == uses
    joined = counts.grouped(lambda total: "all")
    assert joined.totals[0] == sum(counts.totals.values())
    assert sum(joined.uses.values()) == sum(counts.uses.values())


def test_only_significant_overuse_is_listed():
    # Expert 0 receives every "x", expert 1 every "rare", and expert 2 every "rarest". All other
    # choices are random.
    chance = random.Random(1)
    features, expert_ids = [], []
    for _ in range(4000):
        name = chance.choices(["x", "y", "z"], weights=[1, 4, 5])[0]
        features.append([name])
        expert_ids.append([0] if name == "x" else [chance.randrange(4)])
    for _ in range(MIN_COUNT):
        features.append(["rare"])
        expert_ids.append([1])
    for _ in range(MIN_COUNT - 1):
        features.append(["rarest"])
        expert_ids.append([2])
    counts = FeatureCounts(4)
    ids = torch.tensor(expert_ids)
    counts.add(features, ids)
    load = ids.flatten().bincount(minlength=4).tolist()
    found = find_overuse(counts, load, len(ids), 20, 10)
    [row] = found[0]
    assert row["feature"] == "x"
    assert row["uses"] == row["count"]
    assert row["lift"] == pytest.approx(len(ids) / load[0])
    assert 1 < row["low"] < row["lift"] < row["high"]
    names = {feature["feature"] for rows in found.values() for feature in rows}
    assert "rarest" not in names
    assert not names & {"y", "z"}
    # More comparisons require more evidence.
    many = find_overuse(counts, load, len(ids), 10**9, 10)
    assert many[0][0]["low"] < row["low"]
    assert 1 not in many


def test_random_choices_show_no_overuse():
    generator = torch.Generator().manual_seed(5)
    names = [f"piece {int(n)}" for n in torch.randint(50, (3000,), generator=generator)]
    ids = torch.rand(3000, 64, generator=generator).topk(2, dim=1).indices
    counts = FeatureCounts(64)
    counts.add([[name] for name in names], ids)
    load = ids.flatten().bincount(minlength=64).tolist()
    assert find_overuse(counts, load, 3000, 50 * 64, 10) == {}


def test_contexts_are_those_with_the_largest_gates_of_each_expert():
    generator = torch.Generator().manual_seed(2)
    gates = torch.rand(300, 2, generator=generator)
    ids = torch.rand(300, 6, generator=generator).topk(2, dim=1).indices  # 5 marks an empty slot
    top = TopContexts(5, 7)
    for first in range(0, 300, 64):
        rows = slice(first, first + 64)
        top.add(
            ids[rows], gates[rows], lambda token, first=first: {"context": [str(first + token)]}
        )
    for expert in range(5):
        wanted = sorted(
            (-float(gates[token, slot]), token)
            for token in range(300)
            for slot in range(2)
            if ids[token, slot] == expert
        )[:7]
        assert [one["context"] for one in top.of(expert)] == [[str(t)] for _, t in wanted]
        assert [one["gate"] for one in top.of(expert)] == [-gate for gate, _ in wanted]


def test_equal_contexts_are_shown_once():
    top = TopContexts(1, 3)
    ids, gates = torch.zeros(4, 1, dtype=torch.int64), torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    words = ["a", "a", "b", "c"]
    top.add(ids, gates, lambda token: {"context": [words[token]]})
    top.add(ids, gates, lambda token: {"context": [words[token]]})
    assert [one["context"] for one in top.of(0)] == [["a"], ["b"], ["c"]]
    assert top.of(3) == []


def test_complete_words_surround_a_piece():
    tokens = ["<2de>", "▁un", "happi", "ness", "▁is", "▁red", ".", "</s>"]
    assert context_of(tokens, 2) == ["<2de>", "un", "happi", "ness", "is red. </s>"]
    assert context_of(tokens, 5) == ["<2de> unhappiness is", "", "red", ".", "</s>"]
    assert context_of(tokens, 0) == ["", "", "<2de>", "", "unhappiness is red. </s>"]
    assert context_of(tokens, 7)[2:] == ["</s>", "", ""]
    assert context_of(["▁a", "▁", "猫"], 1) == ["a", "", "▁", "猫", ""]
    # Words need not be split into pieces, and long neighbours are shortened.
    assert context_of(["a", "▁b", "c"], 1, has_pieces=False) == ["a", "", "▁b", "", "c"]
    left, *_, right = context_of(["▁" + "y" * 90, "▁m", "▁" + "z" * 90], 1)
    assert left == "…" + "y" * 48
    assert right == "z" * 48 + "…"


def test_classes_describe_spelling_and_position():
    found = classes_of(["<2de>", "▁Un", "happy", "▁NASA", "▁12", ".", "</s>"])
    assert found[0] == ["language token"]
    assert found[-1] == ["end of sentence"]
    assert found[1][:3] == ["capitalised", "beginning of a word", "first in the sentence"]
    assert found[2][:2] == ["lower case", "inside a word"]
    assert found[3][:2] == ["upper case", "whole word"]
    assert found[4][:2] == ["digit", "beginning of a word"]
    assert found[5][:3] == ["punctuation", "inside a word", "last in the sentence"]
    quarters = [row[-1] for row in found[1:-1]]
    assert quarters == [f"quarter {n} of the sentence" for n in (1, 1, 2, 3, 4)]
    assert frequency_band(1) == "piece seen once"
    assert frequency_band(9) == "piece seen 2 to 9 times"
    assert frequency_band(1000) == "piece seen 1000 times or more"


def test_expected_pairs_keep_each_experts_total():
    generator = torch.Generator().manual_seed(4)
    counts = torch.randint(0, 50, (6, 6), generator=generator)
    counts = (counts + counts.t()).fill_diagonal_(0)
    expected = expected_pairs(counts)
    torch.testing.assert_close(expected.sum(1), counts.sum(1).double())
    assert expected.diagonal().eq(0).all()
    # Under quasi-independence, two rows have the same ratio in every other column.
    ratios = expected[0, 2:] / expected[1, 2:]
    torch.testing.assert_close(ratios, ratios[:1].expand(4))


def test_pairs_that_occur_together_are_found():
    usage = ExpertUsage(4)
    generator = torch.Generator().manual_seed(6)
    by_chance = torch.rand(2000, 4, generator=generator).topk(2, dim=1).indices
    usage.add(by_chance, torch.full((2000, 2), 0.5))
    found = compare_pairs(usage, 5)
    assert found is not None
    assert found["over"] == found["under"] == []
    usage.add(torch.tensor([[0, 1]]).expand(600, 2), torch.full((600, 2), 0.5))
    found = compare_pairs(usage, 5)
    assert found is not None
    assert found["num_pairs"] == 6
    assert found["over"][0]["experts"] == [0, 1] or found["over"][0]["experts"] == [2, 3]
    assert [0, 1] in [row["experts"] for row in found["over"]]
    for row in found["over"]:
        assert 1 < row["low"] < row["lift"] < row["high"]
    for row in found["under"]:
        assert row["low"] < row["lift"] < row["high"] < 1
    single = ExpertUsage(4)
    single.add(torch.tensor([[0]]), torch.ones(1, 1))
    assert compare_pairs(single, 5) is None


def test_overlap_of_loads_by_hand():
    one, other = ExpertUsage(3), ExpertUsage(3)
    one.add(torch.tensor([[0], [0], [1], [2]]), torch.ones(4, 1))
    other.add(torch.tensor([[1], [2]]), torch.ones(2, 1))
    # The shares are 1/2, 1/4, 1/4 and 0, 1/2, 1/2.
    assert load_overlap(one, other) == load_overlap(other, one) == pytest.approx(0.5)
    assert load_overlap(one, one) == pytest.approx(1.0)
