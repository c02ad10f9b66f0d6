"""The candidates and rows of one beam-search step: compiled loops compared with torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nmt_moe.kernels import has_compiled_loops
from nmt_moe.search import candidates as operations
from nmt_moe.search.candidates import Candidates, Rows, find_candidates, next_rows

EOS = 2
NEEDS_LOOPS = pytest.mark.skipif(
    not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled"
)


def make_rows(counts: list[int], generator: torch.Generator) -> Rows:
    """Return rows of sentences; `counts` contains the number of rows of each sentence."""
    sentence = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rank = torch.cat([torch.arange(count) for count in counts])
    log_probs = -torch.rand(len(sentence), generator=generator)
    return Rows(sentence, rank, torch.zeros(len(sentence), 1, dtype=torch.int64), log_probs)


def in_torch(monkeypatch: pytest.MonkeyPatch, function: Any, *args: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(operations, "has_compiled_loops", lambda *tensors: False)
        return function(*args)


def candidates_that_count(found: Candidates) -> list[Tensor]:
    is_real = found.log_probs > -torch.inf
    return [found.log_probs, found.tokens[is_real], found.rows[is_real]]


@pytest.mark.parametrize("num_tokens", [5000, 5003])
@pytest.mark.parametrize("levels", [2, 1000])
def test_the_best_of_many_tokens_are_those_of_a_stable_sort(num_tokens: int, levels: int):
    generator = torch.Generator().manual_seed(1)
    log_probs = -torch.randint(levels, (30, num_tokens), generator=generator).float()
    log_probs[0] = -torch.inf
    log_probs[1, 1:] = -torch.inf
    rows = make_rows([1] * 30, generator)
    found, _ = find_candidates(log_probs.clone(), rows, 30, 3, 0.0, EOS)
    expected, order = log_probs.sort(dim=1, descending=True, stable=True)
    totals = rows.log_probs.unsqueeze(1) + expected[:, :4]
    assert torch.equal(found.log_probs[:, :4], totals)
    assert torch.equal(found.tokens[2:, :4], order[2:, :4])


@NEEDS_LOOPS
@pytest.mark.parametrize("margin", [0.0, 1.5])
@pytest.mark.parametrize("num_tokens", [3, 31, 500])
@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 4, 4], [2, 0, 4, 1]])
@pytest.mark.parametrize("levels", [3, 10_000])
def test_compiled_candidates_are_those_of_torch(counts, num_tokens, margin, levels, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    rows = make_rows(counts, generator)
    shape = len(rows.sentence), num_tokens
    log_probs = -torch.randint(levels, shape, generator=generator) * (4 / levels)
    log_probs[:, EOS] += 1
    log_probs[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
    arguments = log_probs, rows, len(counts), 4, margin, EOS
    found, ended = find_candidates(*arguments)
    expected, expected_ended = in_torch(monkeypatch, find_candidates, *arguments)
    for own, theirs in zip(
        candidates_that_count(found), candidates_that_count(expected), strict=True
    ):
        assert own.equal(theirs)
    assert ended.sentence.equal(expected_ended.sentence)
    assert ended.rank.equal(expected_ended.rank)
    is_open = torch.arange(len(counts)) != 1
    for is_kept in (None, found.log_probs > -2.0):
        chosen = next_rows(found, is_open, is_kept, 4, EOS)
        theirs = in_torch(monkeypatch, next_rows, expected, is_open, is_kept, 4, EOS)
        assert all(map(torch.equal, chosen, theirs))


@NEEDS_LOOPS
def test_log_probabilities_may_be_part_of_another_tensor():
    generator = torch.Generator().manual_seed(1)
    rows = make_rows([2, 2], generator)
    whole = torch.randn(4, 3, 50, generator=generator).log_softmax(dim=2)
    for part in (whole[:, -1], whole[..., ::2][:, 0], whole[:, 0, :].t().contiguous().t()):
        assert not part.is_contiguous()
        found, _ = find_candidates(part, rows, 2, 2, 0.0, EOS)
        expected, _ = find_candidates(part.contiguous(), rows, 2, 2, 0.0, EOS)
        assert found.log_probs.equal(expected.log_probs)
        assert found.tokens.equal(expected.tokens)


@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=NEEDS_LOOPS), False])
def test_a_nan_candidate_is_never_continued(is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(operations, "has_compiled_loops", lambda *tensors: False)
    log_probs = torch.full((2, 40), -3.0)
    log_probs[0, 33] = torch.nan
    log_probs[1] = torch.nan
    rows = make_rows([1, 1], torch.Generator().manual_seed(1))
    found, ended = find_candidates(log_probs, rows, 2, 2, 0.0, EOS)
    assert found.log_probs[0, 0].isnan()
    assert found.log_probs[1, :3].isnan().all()
    sentence, *_ = next_rows(found, torch.ones(2, dtype=torch.bool), None, 2, EOS)
    assert sentence.tolist() == [0, 0]
    assert not ended.sentence.numel()
