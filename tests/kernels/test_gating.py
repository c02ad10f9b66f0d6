"""Noisy top-k gating on the CPU, compared with its definition and with hand-computed results."""

import importlib

import pytest
import torch

from nmt_moe.kernels import NOISE_FLOOR, noisy_top_k, reference
from tests.support.gating import (
    SHAPES,
    assert_infinite_logits_are_right,
    assert_is_the_definition,
    make_inputs,
    offsets_of,
)

blocks = importlib.import_module("nmt_moe.kernels._gating_blocks")


@pytest.fixture(params=["one-block", "small-blocks"])
def block_size(request, monkeypatch):
    if request.param == "small-blocks":
        monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 64)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill fresh memory with NaN, so that elements that are never written are noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("rows", "experts", "top_k", "sizes"), SHAPES)
def test_blocks_compute_the_definition(rows, experts, top_k, sizes, training):
    inputs = make_inputs(rows, experts, torch.float64)
    assert_is_the_definition(inputs, top_k, sizes, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("rows", "experts", "top_k"),
    [
        pytest.param(50, 32, 4, id="so-few-that-they-are-sorted"),
        pytest.param(100, 32, 4, id="narrow"),
        pytest.param(30, 1024, 4, id="in-two-steps"),
        pytest.param(20, 512, 12, id="too-many-for-two-steps"),
        pytest.param(10, 1001, 2, id="odd-and-wide"),
    ],
)
def test_single_precision_computes_the_definition(rows, experts, top_k, training):
    """Check float32, which has its own implementation of the search for the largest values."""
    inputs = make_inputs(rows, experts, torch.float32)
    assert_is_the_definition(inputs, top_k, None, training, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), [(50, 5), (500, 5), (50, 64), (50, 1024)])
def test_the_lowest_index_wins_among_equals(rows, width):
    assert 50 * 5 <= blocks.FEW_NUMBERS < 500 * 5  # a few scores are sorted; many are searched
    torch.manual_seed(0)
    scores = torch.randint(-2, 3, (rows, width)).float()
    scores[scores == 0] = torch.tensor([0.0, -0.0])[torch.randint(0, 2, ((scores == 0).sum(),))]
    scores[0] = -torch.inf
    values, ids = blocks.largest(scores, 4)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, expected.indices[:, :4])
    assert torch.equal(values, expected.values[:, :4])


def test_two_experts_by_hand():
    # The scale is softplus(0) + 0.01. Without noise, expert 1 would win. Noise adds 2 to the logit
    # of expert 0, so expert 0 wins instead.
    clean, scale = torch.tensor([[0.0, 1.0]]), torch.tensor(2.0).log() + NOISE_FLOOR
    noise = torch.tensor([[2.0 / scale, 0.0]])
    out = noisy_top_k(clean, torch.zeros(1, 2), 1, noise)
    assert out.expert_ids.tolist() == [[0]]
    assert out.gates.tolist() == [[1.0]]
    assert out.tokens_per_expert.tolist() == [1, 0]
    # Expert 0 must beat the noisy logit 1 of expert 1. Expert 1 must beat the noisy logit 2 of
    # expert 0.
    load = torch.special.ndtr(torch.tensor([0.0 - 1.0, 1.0 - 2.0]) / scale)
    torch.testing.assert_close(out.load, load)


def test_gradients_are_those_of_finite_differences():
    inputs = make_inputs(6, 5, torch.float64)
    noise, offsets = inputs["noise"], offsets_of([2, 4])
    leaves = [inputs[name].detach()[2:] for name in ("clean", "raw_scale", "row_weight")]
    noise, offsets = noise[2:], offsets_of([1, 3])
    leaves = [leaf.requires_grad_() for leaf in leaves]  # without the rows that contain ties

    def smooth(clean, raw_scale, row_weight):
        out = noisy_top_k(clean, raw_scale, 2, noise, offsets, row_weight)
        return out.gates, out.importance, out.load

    assert torch.autograd.gradcheck(smooth, leaves)


def test_the_noise_follows_the_seed():
    clean, raw_scale = torch.randn(64, 256), torch.randn(64, 256)

    def run(seed, **options):
        torch.manual_seed(seed)
        return noisy_top_k(clean, raw_scale, 4, **options)

    first = run(3)
    assert all(torch.equal(a, b) for a, b in zip(first[:5], run(3)[:5], strict=True))
    assert not torch.equal(first.expert_ids, run(4).expert_ids)
    torch.manual_seed(3)
    given = run(5, noise=torch.randn(64, 256))
    assert torch.equal(first.expert_ids, given.expert_ids)
    torch.testing.assert_close(first.load, given.load)


def test_the_backward_pass_uses_the_noise_of_the_forward_pass():
    clean, raw_scale = (torch.randn(9, 8, dtype=torch.float64) for _ in range(2))

    def loss(clean, raw_scale):
        torch.manual_seed(7)  # the same noise each time
        out = noisy_top_k(clean, raw_scale, 3)
        return out.gates.square().sum() + out.load.square().sum()

    assert torch.autograd.gradcheck(loss, (clean.requires_grad_(), raw_scale.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_logits_give_finite_numbers(dtype):
    clean = torch.tensor([[300.0, -300.0, 0.0, 1e-30]], dtype=dtype, requires_grad=True)
    raw_scale = torch.tensor([[-200.0, 200.0, 0.0, 50.0]], dtype=dtype, requires_grad=True)
    noise = torch.zeros(1, 4, dtype=dtype)
    out = noisy_top_k(clean, raw_scale, 2, noise)
    (out.gates.square().sum() + out.load.square().sum()).backward()
    assert torch.isfinite(out.load).all()
    assert torch.isfinite(clean.grad).all()
    assert torch.isfinite(raw_scale.grad).all()


def test_noise_and_logits_of_minus_infinity():
    assert_infinite_logits_are_right()


def test_no_rows():
    clean = torch.zeros(0, 3, requires_grad=True)
    out = noisy_top_k(clean, clean, 2, row_offsets=torch.tensor([0, 0, 0]))
    assert out.load.shape == (2, 3)
    assert not out.load.any()
    (out.gates.sum() + out.importance.sum() + out.load.sum()).backward()
    assert clean.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 5}, r"`top_k` must be from 1 to 4, but is 5"),
        ({"raw_scale": torch.zeros(3, 5)}, r"`raw_scale` must have the shape \(N, E\) = \(3, 4\)"),
        ({"noise": torch.zeros(2, 4)}, r"`noise` must have the shape \(N, E\) = \(3, 4\)"),
        ({"row_weight": torch.zeros(3, 1)}, r"`row_weight` must have the shape \(N\) = \(3\)"),
        ({"row_offsets": torch.tensor(3)}, r"`row_offsets` .* but has \(\)"),
    ],
)
def test_mismatched_arguments_are_refused(changed, message):
    with pytest.raises(ValueError, match=message.replace(r"\(N\)", r"\(N,\)")):
        noisy_top_k(**{"clean": torch.zeros(3, 4), "raw_scale": None, "top_k": 2, **changed})


def test_the_definition_draws_noise_too():
    torch.manual_seed(0)
    clean = torch.zeros(4000, 8)
    out = reference.noisy_top_k(clean, clean, 2)
    assert out.load.max() / out.load.mean() < 1.05
