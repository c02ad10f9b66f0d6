"""Gather and combine in plain torch and in Triton, compared with their definitions."""

import pytest
import torch

from nmt_moe.kernels import RowPlan, combine_rows, gather_rows, plan_rows, reference
from tests.support.kernels import ON_DEVICE, assert_same, leaf, poisoned_memory

SHAPES = [  # (tokens, experts, experts per token, dim)
    pytest.param(9, 4, 2, 8, id="the-usual-case"),
    pytest.param(33, 7, 3, 5, id="nothing-is-a-power-of-two"),
    pytest.param(1, 6, 2, 3, id="fewer-rows-than-a-block"),
    pytest.param(5, 3, 2, 1100, id="a-vector-is-longer-than-a-block"),
    pytest.param(0, 3, 2, 3, id="no-tokens"),
]


@pytest.fixture(params=["torch", ON_DEVICE])
def dtype(request):
    """Run the test on both paths, torch in float64 and Triton in float32."""
    if request.param == "torch":
        return torch.float64
    request.getfixturevalue("device")
    return torch.float32


def make_plan(tokens: int, experts: int, top_k: int, empty_slots: bool = False) -> RowPlan:
    torch.manual_seed(1)
    expert_ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    if empty_slots:
        expert_ids[::3] = experts  # tokens without any expert
        expert_ids[1::3, -1] = experts
    return plan_rows(expert_ids, experts)


@pytest.mark.parametrize("empty_slots", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "dim"), SHAPES)
def test_gather_rows(tokens, experts, top_k, dim, empty_slots, dtype):
    plan, x = make_plan(tokens, experts, top_k, empty_slots), leaf(tokens, dim, dtype=dtype)
    expected = reference.gather_rows(x, plan)
    with poisoned_memory():
        assert_same(gather_rows(x, plan), expected, {"x": x})


@pytest.mark.parametrize("empty_slots", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "dim"), SHAPES)
def test_combine_rows(tokens, experts, top_k, dim, empty_slots, dtype):
    plan = make_plan(tokens, experts, top_k, empty_slots)
    rows = leaf(len(plan.row_token), dim, dtype=dtype)
    gates = torch.rand(tokens, top_k, dtype=dtype) * (plan.token_rows < len(rows))
    gates.requires_grad_()
    for weights, leaves in ((gates, {"rows": rows, "gates": gates}), (None, {"rows": rows})):
        expected = reference.combine_rows(rows, weights, plan)
        with poisoned_memory():
            assert_same(combine_rows(rows, weights, plan), expected, leaves)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_computed_in_float32(half, device):
    plan = make_plan(12, 5, 3, empty_slots=True)
    rows, gates = leaf(len(plan.row_token), 20, dtype=half), leaf(12, 3, dtype=half)
    wide = [t.detach().float().requires_grad_() for t in (rows, gates)]
    ours = combine_rows(rows, gates, plan)
    theirs = reference.combine_rows(*wide, plan)
    grad = torch.randn_like(ours)
    pairs = {"y": (ours, theirs)}
    mine = torch.autograd.grad(ours, (rows, gates), grad)
    expected = torch.autograd.grad(theirs, wide, grad.float())
    pairs |= {"rows": (mine[0], expected[0]), "gates": (mine[1], expected[1])}
    for name, (one, other) in pairs.items():
        # A GPU rounds results once, at the end; the interpreter truncates them.
        step = torch.finfo(half).eps
        torch.testing.assert_close(
            one.float(), other, rtol=step, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gates_in_float32_are_not_rounded_to_the_rows_dtype(device):
    plan = make_plan(12, 5, 3)
    rows = leaf(36, 20, dtype=torch.bfloat16)
    gates = leaf(12, 3, dtype=torch.float32)
    wide = rows.detach().float().requires_grad_()
    ours, theirs = combine_rows(rows, gates, plan), reference.combine_rows(wide, gates, plan)
    grad = torch.randn_like(ours)
    [mine] = torch.autograd.grad(ours, [gates], grad)
    [expected] = torch.autograd.grad(theirs, [gates], grad.float())
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    # A GPU rounds results once, at the end; the interpreter truncates them.
    torch.testing.assert_close(
        ours.float(), theirs, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5
    )


def test_repeated_runs_agree_bit_for_bit(device):
    plan = make_plan(40, 5, 3)
    rows, gates = leaf(120, 33, dtype=torch.float32), leaf(40, 3, dtype=torch.float32)
    x, grad = leaf(40, 33, dtype=torch.float32), torch.randn(40, 33)

    def run() -> list[torch.Tensor]:
        y = combine_rows(rows, gates, plan)
        copies = gather_rows(x, plan)
        grads = torch.autograd.grad([y, copies], [rows, gates, x], [grad, rows.detach()])
        return [y, copies, *grads]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_an_expanded_gradient_is_accepted(dtype):
    plan, x = make_plan(6, 3, 2), leaf(6, 4, dtype=dtype)
    rows = gather_rows(x, plan)
    ones = torch.ones(6, 2, dtype=dtype)
    combine_rows(rows, ones, plan).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((6, 4), 2.0, dtype=dtype))


def test_positions_beyond_two_to_the_31(device):
    """Check large offsets with little memory by touching only one row."""
    from nmt_moe.kernels._triton.combine_rows import combine_rows_backward
    from nmt_moe.kernels._triton.gather_rows import gather_rows, sum_rows

    last = 2**21
    x = torch.empty(last + 1, 1024, dtype=torch.float16)
    x[last] = torch.arange(1024)
    assert torch.equal(gather_rows(x, torch.tensor([last]))[0], x[last])
    token_rows = torch.tensor([[last]])
    assert torch.equal(sum_rows(x, token_rows)[0], x[last])
    half = torch.full((1, 1), 0.5, dtype=torch.float16)
    ones = torch.ones(1, 1024, dtype=torch.float16)
    grad_rows, grad_gates = combine_rows_backward(ones / 1024, x, half, token_rows)
    assert (grad_rows[last] == 0.5 / 1024).all()
    assert grad_gates.item() == 511.5  # the mean of 0 to 1023
