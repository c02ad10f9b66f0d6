"""The outputs and all gradients of the fused mixture, compared with those of its definition."""

from importlib import import_module

import pytest
import torch

from nmt_moe.kernels import _memory, _products, mixture_ffn, plan_rows, reference

SHAPES = [  # (tokens, experts, experts per token, dim, hidden)
    pytest.param(9, 4, 2, 8, 16, id="the-usual-case"),
    pytest.param(33, 7, 3, 5, 11, id="nothing-is-a-power-of-two"),
    pytest.param(1, 6, 2, 3, 4, id="most-experts-are-empty"),
    pytest.param(5, 3, 3, 4, 6, id="all-experts"),
    pytest.param(0, 3, 2, 3, 4, id="no-tokens"),
]
NAMES = ("x", "gates", "weight_in", "weight_out")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill uninitialised tensors with NaN, so that elements that are never written are noticed."""
    empty = _memory.empty
    monkeypatch.setattr(
        _memory, "empty", lambda shape, like: empty(shape, like).fill_(float("nan"))
    )


def draw(tokens, experts, top_k, dim, hidden, dtype=torch.float64):
    torch.manual_seed(1)
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    shapes = [(tokens, dim), (tokens, top_k), (experts, dim, hidden), (experts, hidden, dim)]
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return leaves, ids


def call(function, leaves, plan, **options):
    x, gates, weight_in, weight_out = leaves
    return function(x, gates, plan, weight_in, weight_out, **options)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "dim", "hidden"), SHAPES)
def test_mixture_ffn(tokens, experts, top_k, dim, hidden, recompute):
    leaves, ids = draw(tokens, experts, top_k, dim, hidden)
    plan = plan_rows(ids, experts)
    ours = call(mixture_ffn, leaves, plan, recompute=recompute)
    theirs = call(reference.mixture_ffn, leaves, plan)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, leaves, grad)
    expected = torch.autograd.grad(theirs, leaves, grad)
    for name, one, other in zip(NAMES, mine, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_empty_slots_and_a_token_without_an_expert():
    leaves, ids = draw(4, 3, 2, 5, 6)
    ids[1, 1] = ids[2] = 3  # E marks an empty slot
    with torch.no_grad():
        leaves[1].masked_fill_(ids == 3, 0.0)
    plan = plan_rows(ids, 3)
    y = call(mixture_ffn, leaves, plan)
    expected = call(reference.mixture_ffn, leaves, plan)
    torch.testing.assert_close(y, expected)
    assert not y[2].any()
    grad = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(out, leaves, grad) for out in (y, expected))
    for name, one, other in zip(NAMES, mine, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "dim", "hidden"), SHAPES)
def test_without_gradients(tokens, experts, top_k, dim, hidden, dtype):
    leaves, ids = draw(tokens, experts, top_k, dim, hidden, dtype)
    plan = plan_rows(ids, experts)
    with torch.no_grad():
        y, again = (call(mixture_ffn, leaves, plan) for _ in range(2))
        expected = call(reference.mixture_ffn, leaves, plan)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y, again)


def test_empty_slots_without_gradients_and_a_token_without_an_expert():
    for aligned in (True, False):  # torch's grouped product, and this project's products
        leaves, ids = draw(4, 3, 2, 4, 8 if aligned else 6, torch.float32)
        ids[1, 1] = ids[2] = 3
        leaves = [leaf.detach() for leaf in leaves]
        leaves[1].masked_fill_(ids == 3, 0.0)
        plan = plan_rows(ids, 3)
        y = call(mixture_ffn, leaves, plan)
        torch.testing.assert_close(y, call(reference.mixture_ffn, leaves, plan))
        assert not y[2].any()


def test_the_operands_decide_which_product_is_used_without_gradients():
    def takes_torchs(dim, hidden, dtype=torch.float32, skipped=0):
        weight_in, weight_out = (
            torch.zeros(skipped + 3 * dim * hidden, dtype=dtype)[skipped:].view(3, *shape)
            for shape in ((dim, hidden), (hidden, dim))
        )
        return _products.loops_in_torch(weight_in.new_zeros(2, dim), weight_in, weight_out)

    assert takes_torchs(4, 8) == hasattr(torch.nn.functional, "grouped_mm")
    assert not takes_torchs(4, 8, torch.float64)
    assert not takes_torchs(4, 6)
    assert not takes_torchs(6, 4)
    assert not takes_torchs(4, 8, torch.bfloat16)
    assert not takes_torchs(4, 8, skipped=1)  # not aligned to 16 bytes


@pytest.mark.parametrize("changed", ["FEW_ROWS", "loops_in_torch", "has_compiled_loops", "both"])
def test_all_paths_without_gradients_agree(changed, monkeypatch):
    leaves, ids = draw(40, 6, 3, 16, 24, torch.float32)
    plan = plan_rows(ids, 6)
    with torch.no_grad():
        y = call(mixture_ffn, leaves, plan)
        if changed == "FEW_ROWS":
            monkeypatch.setattr(import_module("nmt_moe.kernels.mixture_ffn"), changed, 0)
        else:
            both = "loops_in_torch", "has_compiled_loops"
            for name in both if changed == "both" else [changed]:
                monkeypatch.setattr(_products, name, lambda *_: False)
        torch.testing.assert_close(y, call(mixture_ffn, leaves, plan))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_hidden_activations_are_kept_only_for_gradients(with_gradients, monkeypatch):
    shapes, empty = [], _memory.empty
    monkeypatch.setattr(
        _memory, "empty", lambda shape, like: [shapes.append(tuple(shape)), empty(shape, like)][1]
    )
    leaves, ids = draw(800, 8, 2, 4, 6)  # more than FEW_ROWS
    with torch.set_grad_enabled(with_gradients):
        call(mixture_ffn, leaves, plan_rows(ids, 8))
    most_rows = max(rows for rows, width in shapes if width == 6)
    assert (most_rows >= 1600) == with_gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_agree_with_float64(dtype):
    leaves, ids = draw(40, 5, 2, 16, 24, dtype)
    plan = plan_rows(ids, 5)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours, theirs = call(mixture_ffn, leaves, plan), call(reference.mixture_ffn, wide, plan)
    grad = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, leaves, grad)
    expected = torch.autograd.grad(theirs, wide, grad.double())
    # Each value is rounded about four times, by at most eps each time.
    scale = 4 * torch.finfo(dtype).eps
    for name, one, other in zip(("y", *NAMES), (ours, *mine), (theirs, *expected), strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert one.dtype == dtype, name
        assert error < scale, f"{name}: {error:.2g} is more than {scale:.2g}"


@pytest.mark.parametrize("is_training", [True, False])
def test_gates_stay_in_float32_beside_tokens_in_half_precision(is_training):
    leaves, ids = draw(40, 5, 2, 16, 24, torch.float32)
    x, gates, *weights = leaves
    half = [t.detach().bfloat16().requires_grad_(is_training) for t in (x, *weights)]
    gates = gates.detach().requires_grad_(is_training)
    y = call(mixture_ffn, [half[0], gates, *half[1:]], plan_rows(ids, 5))
    assert y.dtype == torch.bfloat16
    if is_training:
        [gradient] = torch.autograd.grad(y.float().square().sum(), [gates])
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_repeated_runs_give_the_same_bits():
    leaves, ids = draw(300, 6, 3, 32, 48, torch.float32)
    plan = plan_rows(ids, 6)
    runs = []
    for _ in range(2):
        y = call(mixture_ffn, leaves, plan)
        runs.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_kept_and_recomputed_activations_give_the_same_bits():
    leaves, ids = draw(300, 6, 3, 32, 48, torch.float32)
    plan = plan_rows(ids, 6)
    kept, again = (
        torch.autograd.grad(call(mixture_ffn, leaves, plan, recompute=flag).sum(), leaves)
        for flag in (False, True)
    )
    for name, one, other in zip(NAMES, kept, again, strict=True):
        assert torch.equal(one, other), name


def test_mismatched_shapes_are_refused():
    (x, gates, weight_in, weight_out), ids = draw(4, 3, 2, 5, 6)
    plan = plan_rows(ids, 3)
    with pytest.raises(ValueError, match=r"`x` must have the shape \(N, D\)"):
        mixture_ffn(x[:, 1:], gates, plan, weight_in, weight_out)
    with pytest.raises(ValueError, match=r"`weight_out` must have the shape \(E, H, D\)"):
        mixture_ffn(x, gates, plan, weight_in, weight_out[:, 1:])
    with pytest.raises(ValueError, match=r"`plan.offsets` must have the shape \(E \+ 1,\)"):
        mixture_ffn(x, gates, plan_rows(ids, 4), weight_in, weight_out)


def test_offsets_beyond_two_to_the_31st_element():
    experts, dim, hidden = 4097, 1024, 512  # 2^31 elements before the last expert
    # Pages that are not touched take up no memory.
    weight_in = torch.empty(experts, dim, hidden, dtype=torch.bfloat16)
    weight_out = torch.empty(experts, hidden, dim, dtype=torch.bfloat16)
    weight_in[-1], weight_out[-1] = 0.5, 0.25
    plan = plan_rows(torch.tensor([[experts - 1]]), experts)
    x = torch.ones(1, dim, dtype=torch.bfloat16)
    y = mixture_ffn(x, x[:, :1], plan, weight_in, weight_out)
    # Hidden activations are 1024 * 0.5 = 512, and outputs are 512 * 512 * 0.25 = 2^16.
    assert y.eq(2.0**16).all()
