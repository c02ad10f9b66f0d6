"""One update of factored Adam, compared with its definition and with results worked out by hand."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from nmt_moe.kernels import factored_adam, has_compiled_loops, reference

# Use import_module, because the package's attribute of that name is the function.
operation = import_module("nmt_moe.kernels.factored_adam")

SHAPES = [  # (experts, dim, hidden)
    pytest.param((3, 8, 16), id="the-usual-case"),
    pytest.param((2, 33, 65), id="nothing-is-a-power-of-two"),
    pytest.param((2, 1, 7), id="one-row"),
    pytest.param((2, 7, 1), id="one-column"),
    pytest.param((1, 70, 300), id="more-than-one-tile"),
]
OPTIONS = {"lr": 0.02, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
BLOCKS = [
    pytest.param(1 << 17, id="one-block"),
    pytest.param(200, id="blocks-of-rows"),
    pytest.param(1, id="row-by-row"),
]


@pytest.fixture(autouse=True)
def poison_empty():
    """Fill fresh memory with NaN, so that elements that are never written are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def make_state(experts: int, dim: int, hidden: int, dtype=torch.float64, seed: int = 1):
    torch.manual_seed(seed)
    means = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(experts, dim, hidden).to(dtype)
    row_mean = torch.rand(experts, dim, dtype=means)
    return weight, row_mean, torch.rand(experts, hidden, dtype=means)


def make_grad(weight: Tensor, scale: float = 1.0) -> Tensor:
    return (torch.randn(weight.shape) * scale).to(weight.dtype)


def update_both(weight, row_mean, column_mean, grads: list[Tensor]):
    """Run the operation in place; return its results and the results of its definition."""
    expected = weight, row_mean, column_mean
    for step, grad in enumerate(grads, 1):
        options = {"step": step, **OPTIONS}
        # Both start each update from the same weights, because half precision rounds them.
        wide = [weight.to(row_mean.dtype), grad.to(row_mean.dtype)]
        expected = reference.factored_adam(*wide, row_mean, column_mean, **options)
        factored_adam(weight, grad, row_mean, column_mean, **options)
    return (weight, row_mean, column_mean), expected


def assert_same(ours, theirs, **tolerance):
    for name, one, other in zip(("weight", "row_mean", "column_mean"), ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other.to(one.dtype), msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.fixture
def without_compiled_loops(monkeypatch):
    monkeypatch.setattr(operation, "has_compiled_loops", lambda *tensors: False)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_in_torchs_operations_follow_the_definition(
    shape, block, monkeypatch, without_compiled_loops
):
    monkeypatch.setattr(operation, "CPU_BLOCK", block)
    state = make_state(*shape)
    assert_same(*update_both(*state, [make_grad(state[0]) for _ in range(3)]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param((9, 130, 70), id="several-groups")])
def test_updates_follow_the_definition(shape, dtype):
    state = make_state(*shape, dtype)
    assert_same(*update_both(*state, [make_grad(state[0]) for _ in range(3)]))


@pytest.mark.skipif(not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled")
def test_an_update_has_the_same_bits_on_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            state = make_state(9, 130, 70, torch.float32)
            results.append(update_both(*state, [make_grad(state[0])])[0])
    finally:
        torch.set_num_threads(before)
    for one, other in ((results[0], results[1]), (results[1], results[2])):
        assert all(mine.equal(theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    state = make_state(2, 33, 65, dtype)
    ours, theirs = update_both(*state, [make_grad(state[0]) for _ in range(2)])
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    assert_same(ours, theirs)


def test_an_update_by_hand():
    # The squared gradients [[1, 4], [4, 16]] have row means 2.5 and 10, column means 2.5 and 10,
    # and mean 6.25. New squares have weight 0.25. The second moment of the corner is
    # (0.25 * 10) * (0.25 * 10) / (0.25 * 6.25) = 4 = 0.25 * 16, and its root is 2. In the first
    # update, the bias correction sqrt(1 - 0.75) = 0.5 turns 4 / 2 into a step of 1.
    grad = torch.tensor([[[1.0, -2.0], [2.0, 4.0]]])
    weight = torch.zeros(1, 2, 2)
    row_mean, column_mean = torch.zeros(1, 2), torch.zeros(1, 2)
    factored_adam(weight, grad, row_mean, column_mean, step=1, lr=0.1, beta2=0.75, eps=1e-12)
    torch.testing.assert_close(row_mean, torch.tensor([[0.625, 2.5]]))
    torch.testing.assert_close(column_mean, torch.tensor([[0.625, 2.5]]))
    torch.testing.assert_close(weight, torch.tensor([[[-0.1, 0.1], [-0.1, -0.1]]]))


def check_idle_experts():
    weight, row_mean, column_mean = make_state(3, 5, 6, torch.float32)
    row_mean[1], column_mean[1] = 0, 0  # this expert never had a gradient
    before = [tensor.clone() for tensor in (weight, row_mean, column_mean)]
    grad = make_grad(weight)
    grad[1:] = 0
    factored_adam(weight, grad, row_mean, column_mean, step=9, lr=0.1, beta2=0.5, eps=1e-8)
    assert weight[1:].equal(before[0][1:])
    assert not weight[0].equal(before[0][0])
    assert row_mean[1].count_nonzero() == 0
    assert row_mean[2].equal(before[1][2] * 0.5)
    assert column_mean[2].equal(before[2][2] * 0.5)


def test_an_expert_without_tokens_keeps_its_weights_and_its_means_decay():
    check_idle_experts()


def test_torchs_operations_do_not_move_an_expert_without_tokens(without_compiled_loops):
    check_idle_experts()


def test_triton_does_not_move_an_expert_without_tokens(device):
    check_idle_experts()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_gradients_of_any_size_move_the_weights(scale, is_compiled, request):
    if not is_compiled:
        request.getfixturevalue("without_compiled_loops")
    # Multiplying two means would exceed the range of float32.
    state = make_state(1, 4, 6, torch.float32)
    weight, row_mean, column_mean = state[0].zero_(), state[1].zero_(), state[2].zero_()
    row, column = torch.rand(1, 4, 1) + 0.5, torch.rand(1, 1, 6) + 0.5
    grad = row * column * scale
    factored_adam(weight, grad, row_mean, column_mean, step=1, lr=0.1, beta2=0.9, eps=1e-30)
    torch.testing.assert_close(weight, torch.full_like(weight, -0.1))


def test_an_update_without_experts_is_accepted():
    state = make_state(0, 4, 6)
    factored_adam(state[0], state[0], *state[1:], step=1, **OPTIONS)


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_follows_the_definition(shape, device):
    state = make_state(*shape, torch.float32)
    assert_same(*update_both(*state, [make_grad(state[0]) for _ in range(2)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_computes_low_precision_in_float32(dtype, device):
    state = make_state(2, 33, 65, dtype)
    # The interpreter truncates to bfloat16, whereas a GPU rounds, so the last digits may differ.
    tolerance = {"rtol": 1e-2, "atol": 1e-4}
    assert_same(*update_both(*state, [make_grad(state[0])]), **tolerance)


def test_triton_gives_the_same_bits_again(device):
    results = []
    for _ in range(2):
        state = make_state(2, 40, 260, torch.float32)
        results.append(update_both(*state, [make_grad(state[0])])[0])
    for one, other in zip(*results, strict=True):
        assert one.equal(other)


def test_triton_reaches_beyond_two_to_the_31_elements(device):
    """Check an expert that starts at element 2^31, in memory that is mostly never touched."""
    kernel = pytest.importorskip("nmt_moe.kernels._triton.factored_adam")
    torch.use_deterministic_algorithms(False)  # deterministic ones would fill all of the memory
    weight, row_mean, column_mean = make_state(2, 4, 8, torch.float32)
    grad = make_grad(weight)
    far = torch.empty(2**31 + 32, dtype=torch.bfloat16).as_strided((2, 4, 8), (2**31, 8, 1))
    far_grad = torch.empty(2**31 + 32, dtype=torch.bfloat16).as_strided((2, 4, 8), (2**31, 8, 1))
    far.copy_(weight)
    far_grad.copy_(grad)
    near, near_grad = far.clone().contiguous(), far_grad.clone().contiguous()
    results = []
    for tensors in ((far, far_grad), (near, near_grad)):
        means = row_mean.clone(), column_mean.clone()
        kernel.factored_adam(*tensors, *means, 0.1, 0.9, 1e-3, 1.0)
        results.append((tensors[0], *means))
    assert not near.equal(weight.bfloat16())
    for one, other in zip(*results, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (4, 6), r"`weight` must have the shape \(E, D, H\)"),
        (
            "grad",
            (2, 6, 4),
            r"`grad` must have the shape .* = \(2, 4, 6\), .* \(2, 6, 4\)",
        ),
        ("row_mean", (2, 6), r"`row_mean` must have the shape \(E, D\) = \(2, 4\)"),
        ("column_mean", (2, 4), r"`column_mean` must have the shape \(E, H\) = \(2, 6\)"),
    ],
)
def test_mismatched_shapes_are_refused(name, shape, message):
    shapes = {"weight": (2, 4, 6), "grad": (2, 4, 6), "row_mean": (2, 4), "column_mean": (2, 6)}
    tensors = {key: torch.zeros(size) for key, size in {**shapes, name: shape}.items()}
    with pytest.raises(ValueError, match=message):
        factored_adam(**tensors, step=1, **OPTIONS)
