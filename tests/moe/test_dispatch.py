"""The plan that brings rows into expert order."""

import torch

from nmt_moe.moe import plan_dispatch


def test_plan_by_hand():
    plan = plan_dispatch(torch.tensor([[2, 0], [0, 3], [2, 3]]), num_experts=5)
    # expert 0: tokens 0, 1; expert 2: tokens 0, 2; expert 3: tokens 1, 2
    assert plan.row_token.tolist() == [0, 1, 0, 2, 1, 2]
    assert plan.expert_offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert plan.tokens_per_expert.tolist() == [2, 0, 2, 2, 0]
    assert plan.token_rows.tolist() == [[2, 0], [1, 4], [3, 5]]


def test_token_rows_is_the_inverse_of_row_token():
    torch.manual_seed(0)
    plan = plan_dispatch(torch.rand(50, 9).argsort(1)[:, :3], num_experts=9)
    for token, rows in enumerate(plan.token_rows.tolist()):
        assert plan.row_token[rows].tolist() == [token] * 3
    assert sorted(plan.token_rows.flatten().tolist()) == list(range(150))


def test_no_tokens_make_an_empty_plan():
    plan = plan_dispatch(torch.empty(0, 2, dtype=torch.int64), num_experts=3)
    assert plan.row_token.shape == (0,)
    assert plan.token_rows.shape == (0, 2)
    assert plan.expert_offsets.tolist() == [0, 0, 0, 0]
