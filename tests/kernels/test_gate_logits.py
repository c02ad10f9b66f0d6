"""The matrix products of gates, compared with plain products."""

import importlib

import pytest
import torch

from nmt_moe.kernels import gate_logits
from nmt_moe.kernels._backend import INTERPRETED
from tests.support.kernels import ON_DEVICE, poisoned_memory

# Use import_module, because the package's attribute of that name is the function.
operation = importlib.import_module("nmt_moe.kernels.gate_logits")


@pytest.fixture
def precision():
    """Let a test change torch's setting for float32 products."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch lacks the setting")
    yield matmul
    matmul.fp32_precision = "none"


@pytest.mark.parametrize("path", ["torch", ON_DEVICE])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("sizes", [None, [3, 0, 4], [0, 7, 0]])
def test_products_and_gradients(sizes, noisy, path, request):
    dtype, tolerance = torch.float64, {}
    if path == "triton":
        request.getfixturevalue("device")
        dtype, tolerance = torch.float32, {"rtol": 1e-4, "atol": 1e-5}
    torch.manual_seed(0)
    shape = (5, 6) if sizes is None else (len(sizes), 5, 6)
    rows, gate_weight, noise_weight = (
        torch.randn(*size, dtype=dtype, requires_grad=True) for size in ((7, 5), shape, shape)
    )
    offsets = None if sizes is None else torch.tensor([0, *sizes]).cumsum(0)
    weights = [gate_weight, noise_weight] if noisy else [gate_weight]
    with poisoned_memory():
        ours = gate_logits(rows, gate_weight, noise_weight if noisy else None, offsets)
    assert noisy or ours[1] is None
    parts = rows.split(sizes or [7])
    expected = [
        torch.cat([part @ w for part, w in zip(parts, weight.view(-1, 5, 6), strict=True)])
        for weight in weights
    ]
    ours = ours[: len(weights)]
    torch.testing.assert_close(list(ours), expected, **tolerance)
    grads = [torch.randn(7, 6, dtype=dtype) for _ in weights]
    for used in (slice(None), slice(0, 1)):  # as when the load has no gradient
        one, other = (
            torch.autograd.grad(
                out[used],
                [rows, *weights],
                grads[used],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for out in (ours, expected)
        )
        torch.testing.assert_close(one, other, **tolerance)


def results(rows, weights, offsets, grads):
    """Return logits and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (rows, *weights)]
    out = gate_logits(*leaves, offsets)
    return [*out, *torch.autograd.grad(out, leaves, grads)]


def draw_gate(num_rows, dim, experts, groups, device):
    torch.manual_seed(0)
    shape = (groups, dim, experts) if groups else (dim, experts)
    rows, grads = torch.randn(num_rows, dim), [torch.randn(num_rows, experts) for _ in range(2)]
    offsets = torch.tensor([0, num_rows // 3, num_rows], device=device) if groups else None
    return rows, [torch.randn(shape) * dim**-0.5 for _ in range(2)], offsets, grads


def largest_errors(rows, weights, offsets, grads):
    """Return the largest error of each result in float32, divided by the largest value."""
    found = results(rows, weights, offsets, grads)
    wide = rows.double(), [weight.double() for weight in weights], offsets
    expected = results(*wide, [grad.double() for grad in grads])
    pairs = zip(found, expected, strict=True)
    return [((one - other).abs().max() / other.abs().max()).item() for one, other in pairs]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU needs no simulated rounding")
@pytest.mark.parametrize("groups", [0, 2])
def test_three_products_in_tf32_are_as_accurate_as_float32(groups, device, monkeypatch):
    from tests.support import tensor_cores

    gate = draw_gate(300, 96, 40, groups, device)
    with tensor_cores.simulated_rounding() as used:
        three = largest_errors(*gate)
    assert used == {"TF32x3"}
    monkeypatch.setattr(tensor_cores, "multiply_tf32x3", tensor_cores.multiply_tf32)
    with tensor_cores.simulated_rounding():
        single = largest_errors(*gate)
    monkeypatch.setenv("NMT_MOE_KERNELS", "torch")
    plain = largest_errors(*gate)
    for name, errors in zip(
        ("clean", "raw_scale", "by rows", "by gate_weight", "by noise_weight"),
        zip(three, single, plain, strict=True),
        strict=True,
    ):
        assert errors[0] < 3 * errors[2], (name, errors)
        assert errors[0] < 1e-6 < 1e-4 < errors[1], (name, errors)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU needs no simulated rounding")
def test_infinities_and_nan_stay_in_their_rows(device):
    from tests.support.tensor_cores import simulated_rounding

    rows, weights, _, grads = draw_gate(6, 16, 8, 0, device)
    rows[1, 3], rows[4, 5] = float("inf"), float("nan")
    with simulated_rounding():
        found = results(rows, weights, None, grads)
    for logits in found[:2]:
        assert logits.isfinite().all(1).tolist() == [True, False, True, True, False, True]
        assert not logits[1].isfinite().any()
        assert logits[4].isnan().all()


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_torchs_setting_is_followed(setting, groups, device, precision, monkeypatch):
    gate = draw_gate(20, 16, 8, groups, device)
    made = []
    original = operation.TritonProducts
    monkeypatch.setattr(
        operation, "TritonProducts", lambda *args: made.append(args[-1]) or original(*args)
    )
    three = results(*gate)
    assert made == ["tf32x3"]
    precision.fp32_precision = setting
    other = results(*gate)
    assert made == ["tf32x3"]
    torch.testing.assert_close(three, other, rtol=0, atol=0.05)


def test_many_rows_are_divided_into_parts_for_a_gradient(device, monkeypatch):
    """Check parts of equal size, a shorter last part, and a gradient without rows."""
    kernels = importlib.import_module("nmt_moe.kernels._triton.grouped_gemm")
    monkeypatch.setattr(kernels, "PART_ROWS", 6)
    sizes = []
    original = kernels.weight_gradient

    def record(rows, grad, offsets, *rest):
        sizes.append(offsets.diff().tolist())
        return original(rows, grad, offsets, *rest)

    monkeypatch.setattr(kernels, "weight_gradient", record)
    for num_rows, expected in ((25, [5] * 5), (20, [5] * 4), (26, [6] * 4 + [2]), (0, [0])):
        rows, grad = torch.randn(num_rows, 7), torch.randn(num_rows, 9)
        with poisoned_memory():
            found = kernels.one_weight_gradient(rows, grad, 16)
        assert sizes.pop() == expected
        torch.testing.assert_close(found, (rows.t() @ grad).unsqueeze(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate_weight": torch.zeros(4, 6)}, r"`gate_weight` .* \(D, E\) = \(5, any\)"),
        (
            {"gate_weight": torch.zeros(4, 6), "noise_weight": torch.zeros(4, 6)},
            r"`gate_weight` .* \(D, E\) = \(5, any\)",
        ),
        ({"noise_weight": torch.zeros(5, 7)}, r"`noise_weight` .* = \(1, 5, 6\)"),
    ],
)
def test_mismatched_shapes_are_refused(changed, message):
    arguments = {"rows": torch.zeros(3, 5), "gate_weight": torch.zeros(5, 6), "noise_weight": None}
    with pytest.raises(ValueError, match=message):
        gate_logits(**{**arguments, **changed})
