"""Fast operations against their definitions: outputs and every gradient, by name."""

import pytest
import torch

from nmt_moe.kernels import combine_rows, expert_ffn, gather_rows, reference
from nmt_moe.moe import plan_dispatch

SHAPES = [  # (tokens, experts, per token, dim, hidden)
    pytest.param(9, 4, 2, 8, 16, id="the-usual-case"),
    pytest.param(33, 7, 3, 5, 11, id="nothing-is-a-power-of-two"),
    pytest.param(1, 6, 2, 3, 4, id="most-experts-are-empty"),
    pytest.param(0, 3, 2, 3, 4, id="no-tokens"),
]


def assert_same(ours, theirs, leaves: dict[str, torch.Tensor]):
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    tensors = list(leaves.values())
    mine = torch.autograd.grad(ours, tensors, grad)
    expected = torch.autograd.grad(theirs, tensors, grad)
    for name, one, other in zip(leaves, mine, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_plan(tokens, experts, top_k):
    torch.manual_seed(1)
    return plan_dispatch(torch.rand(tokens, experts).argsort(1)[:, :top_k], experts)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "dim", "hidden"), SHAPES)
def test_gather_rows(tokens, experts, top_k, dim, hidden):
    plan, x = make_plan(tokens, experts, top_k), leaf(tokens, dim)
    assert_same(
        gather_rows(x, plan.row_token, plan.token_rows),
        reference.gather_rows(x, plan.row_token, plan.token_rows),
        {"x": x},
    )


@pytest.mark.parametrize(("tokens", "experts", "top_k", "dim", "hidden"), SHAPES)
def test_combine_rows(tokens, experts, top_k, dim, hidden):
    plan = make_plan(tokens, experts, top_k)
    rows, gates = leaf(tokens * top_k, dim), leaf(tokens, top_k)
    assert_same(
        combine_rows(rows, gates, plan.row_token, plan.token_rows),
        reference.combine_rows(rows, gates, plan.row_token, plan.token_rows),
        {"rows": rows, "gates": gates},
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "dim", "hidden"), SHAPES)
def test_expert_ffn(tokens, experts, top_k, dim, hidden, recompute, monkeypatch):
    plan = make_plan(tokens, experts, top_k)
    rows = leaf(tokens * top_k, dim)
    weight_in, weight_out = leaf(experts, dim, hidden), leaf(experts, hidden, dim)
    expected = reference.expert_ffn(rows, weight_in, weight_out, plan.expert_offsets)
    poison_empty(monkeypatch)
    assert_same(
        expert_ffn(rows, weight_in, weight_out, plan.expert_offsets, recompute),
        expected,
        {"rows": rows, "weight_in": weight_in, "weight_out": weight_out},
    )


def poison_empty(monkeypatch):
    """Make fresh memory NaN, so that an element nobody writes is seen."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(float("nan")))


def test_all_rows_to_one_expert():
    torch.manual_seed(1)
    rows, weight_in, weight_out = leaf(12, 4), leaf(3, 4, 5), leaf(3, 5, 4)
    offsets = torch.tensor([0, 0, 12, 12])
    assert_same(
        expert_ffn(rows, weight_in, weight_out, offsets),
        torch.relu(rows @ weight_in[1]) @ weight_out[1],
        {"rows": rows, "weight_in": weight_in, "weight_out": weight_out},
    )


@pytest.mark.parametrize(
    ("rows", "weight_out", "offsets", "message"),
    [
        ((6, 5), (3, 8, 4), (4,), r"`rows` must have the shape \(R, D\) = \(any, 4\)"),
        ((6, 4), (3, 4, 8), (4,), r"`weight_out` must have the shape \(L, H, D\) = \(3, 8, 4\)"),
        ((6, 4), (3, 8, 4), (3,), r"`expert_offsets` .* = \(4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(rows, weight_out, offsets, message):
    with pytest.raises(ValueError, match=message):
        expert_ffn(
            torch.zeros(rows),
            torch.zeros(3, 4, 8),
            torch.zeros(weight_out),
            torch.zeros(offsets, dtype=torch.int64),
        )
