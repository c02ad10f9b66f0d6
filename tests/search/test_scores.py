"""Scores, worked out by hand."""

import math

import pytest
import torch

from nmt_moe.search import (
    COVERAGE_FLOOR,
    SearchConfig,
    length_penalty,
    log_coverage,
    normalised_score,
)


def test_length_penalty_by_hand():
    assert length_penalty(10, 0.6) == pytest.approx(1.7329, abs=1e-4)  # (15 / 6)^0.6
    assert length_penalty(1, 0.7) == 1.0
    assert length_penalty(40, 0.0) == 1.0
    penalties = length_penalty(torch.tensor([1.0, 7.0]), 0.5)
    torch.testing.assert_close(penalties, torch.tensor([1.0, math.sqrt(2)]))


def test_coverage_by_hand():
    received = torch.tensor([[0.5, 1.7, 0.25, 0.1], [1.0, 1.0, 1.0, 0.0]])
    words = torch.tensor([[True, True, True, False], [True, True, True, False]])
    # The result is log 0.5 + log 1 + log 0.25, because attention above 1 counts as 1 and the end
    # mark does not count.
    expected = torch.tensor([math.log(0.125), 0.0])
    torch.testing.assert_close(log_coverage(received, words), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_word_without_attention_costs_the_floor(dtype: torch.dtype):
    received = torch.tensor([[0.0, 1.0]], dtype=dtype)
    coverage = log_coverage(received, torch.ones(1, 2, dtype=torch.bool))
    assert coverage.item() == pytest.approx(math.log(COVERAGE_FLOOR))
    assert coverage.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("padding", [0.0, 3.0, math.nan, math.inf])
def test_values_at_padding_do_not_count(padding: float):
    received = torch.tensor([[padding, 0.5, padding]])
    coverage = log_coverage(received, torch.tensor([[False, True, False]]))
    assert coverage.item() == pytest.approx(math.log(0.5))


def test_the_score_is_eq_14():
    score = normalised_score(
        torch.tensor([-3.0]), torch.tensor([7.0]), torch.tensor([-2.0]), alpha=1.0, beta=0.2
    )
    assert score.item() == pytest.approx(-3.0 / 2 - 0.4)


@pytest.mark.parametrize("name", ["length_penalty_alpha", "coverage_penalty_beta", "beam_prune"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_values_are_refused_by_name(name: str, value: float):
    option = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"`{option}` must be a finite number .* but is {value}"):
        SearchConfig(**{name: value})
