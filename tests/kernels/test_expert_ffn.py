"""The experts' feed-forward networks on every path, compared with their definition."""

import pytest
import torch

from nmt_moe.kernels import _products, expert_ffn, reference
from tests.support.kernels import ON_DEVICE, assert_same, leaf, offsets_of, poisoned_memory

SHAPES = [  # (rows per expert, dim, hidden)
    pytest.param([4, 6, 3, 5], 8, 16, id="the-usual-case"),
    pytest.param([11, 20, 0, 33, 7], 5, 11, id="nothing-is-a-power-of-two"),
    pytest.param([0, 1, 0, 1, 0, 0], 3, 4, id="most-experts-have-no-rows"),
    pytest.param([0, 12, 0], 8, 16, id="one-expert-has-all-rows"),
    pytest.param([0, 0, 0], 3, 4, id="no-rows"),
]
PATHS = ["loop", "grouped_mm", ON_DEVICE]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("counts", "dim", "hidden"), SHAPES)
def test_values_and_gradients(counts, dim, hidden, recompute, path, monkeypatch, request):
    if path == "grouped_mm":
        if _products.GROUPED_MM is None or dim % 8 or hidden % 8:
            pytest.skip("torch's grouped product does not accept these sizes")
        monkeypatch.setattr(_products, "suits_grouped_mm", lambda rows, weight: True)
    if path == "triton":
        request.getfixturevalue("device")
    dtype = torch.float64 if path == "loop" else torch.float32
    torch.manual_seed(1)
    rows = leaf(sum(counts), dim, dtype=dtype)
    weight_in = leaf(len(counts), dim, hidden, dtype=dtype)
    weight_out = leaf(len(counts), hidden, dim, dtype=dtype)
    offsets = offsets_of(counts)
    expected = reference.expert_ffn(rows, weight_in, weight_out, offsets)
    leaves = {"rows": rows, "weight_in": weight_in, "weight_out": weight_out}
    tolerance = {} if path == "loop" else {"rtol": 1e-5, "atol": 1e-4}
    with poisoned_memory():
        ours = expert_ffn(rows, weight_in, weight_out, offsets, recompute)
        assert_same(ours, expected, leaves, **tolerance)


@pytest.mark.skipif(_products.GROUPED_MM is None, reason="torch has no grouped product")
@pytest.mark.parametrize("recompute", [False, True])
def test_relu_on_torchs_products_takes_one_operation_and_no_memory(recompute, monkeypatch):
    pytest.importorskip("triton")
    from tests.support.launches import count_launches

    monkeypatch.setattr(_products, "suits_grouped_mm", lambda rows, weight: True)
    products, kept = [], []

    def record(left, right, offs):
        products.append(_products.F.grouped_mm(left, right, offs=offs))
        return products[-1]

    monkeypatch.setattr(_products, "GROUPED_MM", record)
    original = _products.TorchProducts.weight_gradient
    monkeypatch.setattr(
        _products.TorchProducts,
        "weight_gradient",
        lambda self, *operands: kept.extend(operands) or original(self, *operands),
    )
    leaves = leaf(12, 8, dtype=torch.float32), leaf(2, 8, 16, dtype=torch.float32)
    leaves = *leaves, leaf(2, 16, 8, dtype=torch.float32)
    with count_launches() as forward:
        out = expert_ffn(*leaves, offsets_of([5, 7]), recompute)
    with count_launches() as backward:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert forward["relu_"] == 1
    assert backward["threshold_backward"] == 1
    assert backward.get("relu_", 0) == recompute
    # Both the hidden activations and their gradient are products that were changed in place.
    addresses = {product.data_ptr() for product in products}
    assert [operand.shape for operand in kept] == [(12, 16), (12, 8), (12, 8), (12, 16)]
    assert {kept[0].data_ptr(), kept[3].data_ptr()} <= addresses


@pytest.mark.parametrize("path", ["loop", ON_DEVICE])
def test_recomputed_gradients_have_the_same_bits(path, request):
    if path == "triton":
        request.getfixturevalue("device")
    torch.manual_seed(1)
    rows, offsets = leaf(12, 8, dtype=torch.float32), offsets_of([5, 0, 7])
    weight_in, weight_out = (
        leaf(3, 8, 16, dtype=torch.float32),
        leaf(3, 16, 8, dtype=torch.float32),
    )
    grads = [
        torch.autograd.grad(
            expert_ffn(rows, weight_in, weight_out, offsets, recompute).square().sum(),
            [rows, weight_in, weight_out],
        )
        for recompute in (False, True)
    ]
    for kept, recomputed in zip(*grads, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("path", ["loop", ON_DEVICE])
def test_hidden_activations_are_not_kept_when_recomputed(path, request):
    if path == "triton":
        request.getfixturevalue("device")
    rows, offsets = leaf(12, 4, dtype=torch.float32), offsets_of([5, 7])
    weights = leaf(2, 4, 20, dtype=torch.float32), leaf(2, 20, 4, dtype=torch.float32)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        expert_ffn(rows, *weights, offsets, recompute=True)
        assert (12, 20) not in saved
        expert_ffn(rows, *weights, offsets)
    assert (12, 20) in saved


@pytest.mark.parametrize(
    ("rows", "weight_out", "offsets", "message"),
    [
        ((6, 5), (3, 8, 4), (4,), r"`rows` must have the shape \(R, D\) = \(any, 4\)"),
        ((6, 4), (3, 4, 8), (4,), r"`weight_out` must have the shape \(L, H, D\) = \(3, 8, 4\)"),
        ((6, 4), (3, 8, 4), (3,), r"`expert_offsets` .* = \(4\)"),
    ],
)
def test_mismatched_shapes_are_refused(rows, weight_out, offsets, message):
    with pytest.raises(ValueError, match=message):
        expert_ffn(
            torch.zeros(rows),
            torch.zeros(3, 4, 8),
            torch.zeros(weight_out),
            torch.zeros(offsets, dtype=torch.int64),
        )


def test_weights_of_another_dtype_are_refused():
    rows, weight, offsets = torch.zeros(6, 4), torch.zeros(1, 4, 4), torch.tensor([0, 6])
    with pytest.raises(ValueError, match=r"`weight_out` must have the dtype of `rows`"):
        expert_ffn(rows, weight, weight.double(), offsets)
