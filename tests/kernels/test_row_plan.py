"""The plan that sorts rows by bin."""

import torch

from nmt_moe.kernels import _backend, plan_rows


def test_plan_by_hand():
    plan = plan_rows(torch.tensor([[2, 0], [0, 3], [2, 3]]), num_bins=5)
    # Bin 0 has tokens 0 and 1, bin 2 has tokens 0 and 2, and bin 3 has tokens 1 and 2.
    assert plan.row_token.tolist() == [0, 1, 0, 2, 1, 2]
    assert plan.offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert plan.token_rows.tolist() == [[2, 0], [1, 4], [3, 5]]


def test_empty_slots_by_hand(monkeypatch):
    bins = torch.tensor([[1, 2], [2, 2], [0, 1]])  # with two bins, 2 marks an empty slot
    for num_rows in (None, 3):
        plan = plan_rows(bins, 2, num_rows)
        assert plan.row_token.tolist() == [2, 0, 2]
        assert plan.offsets.tolist() == [0, 1, 3]
        assert plan.token_rows.tolist() == [[1, 3], [3, 3], [0, 2]]
    # If the host would have to wait for the count, there are N * K rows, and the last three are
    # unused.
    monkeypatch.setattr(_backend, "HOST_DEVICES", frozenset())
    plan = plan_rows(bins, 2)
    assert plan.row_token.tolist()[:3] == [2, 0, 2]
    assert plan.offsets.tolist() == [0, 1, 3]
    assert plan.token_rows.tolist() == [[1, 6], [6, 6], [0, 2]]


def test_token_rows_is_the_inverse_of_row_token():
    torch.manual_seed(0)
    plan = plan_rows(torch.rand(50, 9).argsort(1)[:, :3], num_bins=9)
    for token, rows in enumerate(plan.token_rows.tolist()):
        assert plan.row_token[rows].tolist() == [token] * 3
    assert sorted(plan.token_rows.flatten().tolist()) == list(range(150))


def test_no_tokens_make_an_empty_plan():
    plan = plan_rows(torch.empty(0, 2, dtype=torch.int64), num_bins=3)
    assert plan.row_token.shape == (0,)
    assert plan.token_rows.shape == (0, 2)
    assert plan.offsets.tolist() == [0, 0, 0, 0]
