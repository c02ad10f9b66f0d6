"""Products with one matrix per expert, by a loop, by torch's grouped product and by Triton."""

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nmt_moe.kernels import _products, grouped_gemm, has_compiled_loops, reference
from nmt_moe.kernels._backend import INTERPRETED
from tests.support.kernels import ON_DEVICE, assert_same, leaf, offsets_of, poisoned_memory

SHAPES = [  # (rows per expert, dim, out dim)
    pytest.param([3, 2], 16, 32, id="fewer-rows-than-a-block"),
    pytest.param([5, 17, 40], 33, 70, id="nothing-is-a-power-of-two"),
    pytest.param([0, 4, 0, 9, 0], 8, 24, id="first-middle-and-last-without-rows"),
    pytest.param([0, 0, 37, 0], 8, 16, id="one-expert-has-all-rows"),
    pytest.param([40], 24, 8, id="one-expert"),
    pytest.param([2] * 60, 4, 8, id="many-experts-few-rows"),
    pytest.param([300, 200], 72, 136, id="many-rows-an-expert"),
    pytest.param([0, 0, 0], 8, 16, id="no-rows"),
]


@pytest.fixture
def kernels(device):
    """Return the module that launches the kernels."""
    return import_module("nmt_moe.kernels._triton.grouped_gemm")


def make(counts, dim, out_dim, dtype):
    torch.manual_seed(1)
    rows, weight = leaf(sum(counts), dim, dtype=dtype), leaf(len(counts), dim, out_dim, dtype=dtype)
    return rows, weight, offsets_of(counts)


def check(rows, weight, offsets, **tolerance):
    expected = reference.grouped_gemm(rows, weight, offsets)
    with poisoned_memory():
        ours = grouped_gemm(rows, weight, offsets)
        assert_same(ours, expected, {"rows": rows, "weight": weight}, **tolerance)


@pytest.mark.parametrize(("counts", "dim", "out_dim"), SHAPES)
def test_loop(counts, dim, out_dim):
    check(*make(counts, dim, out_dim, torch.float64))


@pytest.mark.parametrize(("counts", "dim", "out_dim"), SHAPES)
def test_triton(counts, dim, out_dim, device):
    check(*make(counts, dim, out_dim, torch.float32), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(_products.GROUPED_MM is None, reason="torch has no grouped product")
@pytest.mark.parametrize("zeroed_by", ["torch", ON_DEVICE])
@pytest.mark.parametrize(
    ("counts", "dim", "out_dim"),
    [shape for shape in SHAPES if not shape.values[1] % 8 and sum(shape.values[0])],
)
def test_grouped_product_of_torch(counts, dim, out_dim, zeroed_by, monkeypatch, request):
    if zeroed_by == "triton":
        if not INTERPRETED:
            pytest.skip("on a GPU, torch may refuse float32")
        request.getfixturevalue("device")
    monkeypatch.setattr(_products, "suits_grouped_mm", lambda rows, weight: True)
    check(*make(counts, dim, out_dim, torch.float32), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[400, 0, 200, 301], [3, 0, 5, 1]])
def test_bfloat16_on_a_gpu(counts):
    """Test Triton and, with the first counts on Hopper and Blackwell, torch's grouped product."""
    offsets = offsets_of(counts).cuda()
    rows, weight = (leaf.detach().cuda() for leaf in make(counts, 64, 136, torch.bfloat16)[:2])
    rows.requires_grad_()
    weight.requires_grad_()
    wide = [leaf.detach().float().requires_grad_() for leaf in (rows, weight)]
    ours = grouped_gemm(rows, weight, offsets)
    theirs = reference.grouped_gemm(*wide, offsets)
    mine = torch.autograd.grad(ours, [rows, weight], theirs.detach().bfloat16())
    expected = torch.autograd.grad(theirs, wide, theirs.detach().bfloat16().float())
    for one, other in zip([ours, *mine], [theirs, *expected], strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2**-8, atol=1e-2)


@pytest.mark.slow
def test_more_experts_than_torchs_grouped_product_accepts(device):
    counts = [0] * 1030
    counts[0], counts[1023], counts[1029] = 2, 1, 3
    check(*make(counts, 4, 8, torch.float32))


def test_an_unneeded_gradient_is_not_computed():
    rows, weight, offsets = make([3, 2], 4, 5, torch.float64)
    grouped_gemm(rows.detach(), weight, offsets).sum().backward()
    assert rows.grad is None
    torch.testing.assert_close(weight.grad[1], rows.detach()[3:].sum(0)[:, None].expand(4, 5))


def test_transposed_weights_and_rows_with_a_stride():
    rows = torch.randn(6, 5, dtype=torch.float64).t()
    weight = torch.randn(2, 3, 6, dtype=torch.float64).transpose(1, 2)
    offsets = offsets_of([1, 4])
    torch.testing.assert_close(
        grouped_gemm(rows, weight, offsets), reference.grouped_gemm(rows, weight, offsets)
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_float32(half, kernels):
    rows, weight, offsets = make([0, 20, 50], 33, 70, half)
    rows, weight = rows.detach(), weight.detach()
    grad = torch.randn(70, 70).to(half)
    tiles = kernels.list_tiles(offsets, 70, 32)
    step = torch.finfo(half).eps  # the interpreter truncates once
    with poisoned_memory():
        out = kernels.multiply_rows(rows, weight, offsets, tiles)
        grad_weight = kernels.weight_gradient(rows, grad, offsets, 32)
    expected = reference.grouped_gemm(rows.float(), weight.float(), offsets)
    torch.testing.assert_close(out.float(), expected, rtol=step, atol=1e-4)
    for e in range(3):
        run = slice(offsets[e], offsets[e + 1])
        expected = rows[run].float().t() @ grad[run].float()
        torch.testing.assert_close(grad_weight[e].float(), expected, rtol=step, atol=1e-4)


@pytest.fixture
def float32_settings():
    """Restore torch's old and new settings for float32 products."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    for owner in (torch.backends, torch.backends.cuda.matmul):
        if hasattr(owner, "fp32_precision"):
            owner.fp32_precision = "none"


@pytest.mark.parametrize(
    ("owner", "name", "value", "expected"),
    [
        (torch.backends.cuda.matmul, "allow_tf32", False, "ieee"),
        (torch.backends.cuda.matmul, "allow_tf32", True, "tf32"),
        (torch.backends.cuda.matmul, "fp32_precision", "ieee", "ieee"),
        (torch.backends.cuda.matmul, "fp32_precision", "tf32", "tf32"),
        (torch.backends, "fp32_precision", "tf32", "tf32"),
    ],
)
def test_float32_is_rounded_as_each_of_torchs_settings_requires(
    owner, name, value, expected, kernels, float32_settings
):
    if not hasattr(owner, name):
        pytest.skip("this torch lacks the setting")
    setattr(owner, name, value)
    assert kernels._input_precision(torch.float32) == expected
    assert kernels._input_precision(torch.bfloat16) == "ieee"
    rows, weight, offsets = make([3, 2], 16, 32, torch.float32)
    expected = reference.grouped_gemm(rows, weight, offsets)
    torch.testing.assert_close(grouped_gemm(rows, weight, offsets), expected, rtol=0, atol=0.05)


def test_relu_and_its_gradient_by_hand(kernels):
    rows = torch.tensor([[1.0], [2.0], [float("nan")]])
    weight, offsets = torch.tensor([[[-3.0, 4.0]]]), torch.tensor([0, 3])
    tiles = kernels.list_tiles(offsets, 3, 16)
    nan = float("nan")
    hidden = kernels.multiply_rows(rows, weight, offsets, tiles, relu=True)
    expected = torch.tensor([[0.0, 4.0], [0.0, 8.0], [nan, nan]])  # NaN is propagated
    torch.testing.assert_close(hidden, expected, equal_nan=True)
    mask = torch.tensor([[1.0, 0.0], [-1.0, 2.0], [0.0, 0.0]])
    masked = kernels.multiply_rows(rows, weight, offsets, tiles, mask=mask)
    torch.testing.assert_close(masked, torch.tensor([[-3.0, 0.0], [0.0, 8.0], [0.0, 0.0]]))


def test_repeated_runs_agree_bit_for_bit(device):
    rows, weight, offsets = make([5, 17, 40], 33, 70, torch.float32)

    def run():
        out = grouped_gemm(rows, weight, offsets)
        return [out, *torch.autograd.grad(out, [rows, weight], out.detach())]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_tiles_by_hand(kernels):
    tiles = kernels.list_tiles(offsets_of([0, 20, 1, 0, 16]), 37, 16)
    assert tiles.first_tile.tolist() == [0, 0, 2, 3, 3]
    # For any routing, there are ceil(37 / 16) + min(5, 37) tiles. Four of them have rows.
    assert tiles.expert.tolist() == [1, 1, 2, 4, 5, 5, 5, 5]


def test_the_block_size_depends_only_on_the_mean_rows_per_expert(kernels):
    few, many = (
        [
            kernels.choose_block_rows(mean * num_experts, num_experts, torch.bfloat16)
            for mean in (0, 16, 32, 128, 1000)
        ]
        for num_experts in (4, 4096)
    )
    assert few == many == sorted(few)
    assert few[0] < few[-1]


def test_elements_beyond_two_to_the_31(kernels, monkeypatch):
    """Check large offsets with little memory by touching only a few elements."""
    far = torch.empty(2**31 + 256, dtype=torch.float16)
    weight = far.as_strided((3, 16, 16), (2**30, 16, 1))
    weight[2] = torch.eye(16) * 3
    rows = torch.randn(2, 16).half()
    offsets = offsets_of([0, 0, 2])
    tiles = kernels.list_tiles(offsets, 2, 16)
    out = kernels.multiply_rows(rows, weight, offsets, tiles)
    torch.testing.assert_close(out, rows * 3)
    # The operands, the output and the mask have rows beyond 2^31 elements.
    many = far[: 2**31 + 32].view(2**27 + 2, 16)
    many[-2:] = rows
    offsets = torch.tensor([2**27, 2**27, 2**27, 2**27 + 2])
    tiles = kernels.list_tiles(offsets, 2, 16)
    out = kernels.multiply_rows(many, torch.eye(16).half().expand(3, 16, 16), offsets, tiles)
    torch.testing.assert_close(out[-2:], rows)
    masked = kernels.multiply_rows(many, weight, offsets, tiles, mask=many)
    assert torch.equal(masked[-2:] != 0, rows > 0)
    grad = kernels.weight_gradient(many, many, offsets, 16)
    torch.testing.assert_close(grad[2], rows.t() @ rows)
    # The last expert of this gradient lies beyond 2^31 elements.
    monkeypatch.setattr(torch, "empty", lambda shape, **_: far.as_strided(shape, (2**30, 16, 1)))
    grad = kernels.weight_gradient(rows, rows, offsets_of([0, 0, 2]), 16)
    torch.testing.assert_close(grad[2], rows.t() @ rows)


def test_torch_gets_the_products_that_its_kernel_accepts(monkeypatch):
    monkeypatch.setattr(_products, "GROUPED_MM", lambda: None)
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def suits(experts=32, dim=512, out_dim=1024, dtype=torch.bfloat16, device="cuda"):
        with FakeTensorMode():  # works without a CUDA device
            rows = torch.empty(1000 * experts, dim, dtype=dtype, device=device)
            weight = torch.empty(experts, dim, out_dim, dtype=dtype, device=device)
            return _products.suits_grouped_mm(rows, weight)

    assert suits()
    assert suits(experts=1023)
    refused = [
        {"experts": 1024},
        {"experts": 0},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"dim": 500},
        {"out_dim": 1001},
        {"device": "cpu"},
    ]
    for case in refused:
        assert not suits(**case), case
    capability[0] = 8
    assert not suits()
    monkeypatch.setattr(_products, "GROUPED_MM", None)
    assert not suits()


@pytest.mark.parametrize(
    ("rows", "weight", "offsets", "message"),
    [
        ((6, 5), (3, 4, 8), (4,), r"`rows` must have the shape \(R, D\) = \(any, 4\)"),
        ((6, 4), (4, 8), (4,), r"`weight` must have the shape \(L, D, F\)"),
        ((6, 4), (3, 4, 8), (3,), r"`expert_offsets` .* = \(4\)"),
    ],
)
def test_mismatched_shapes_are_refused(rows, weight, offsets, message):
    with pytest.raises(ValueError, match=message):
        grouped_gemm(
            torch.zeros(rows), torch.zeros(weight), torch.zeros(offsets, dtype=torch.int64)
        )


def test_mismatched_dtypes_are_refused():
    rows, weight, offsets = torch.zeros(6, 4), torch.zeros(1, 4, 8), torch.tensor([0, 6])
    with pytest.raises(ValueError, match=r"`weight` .* of `rows`, torch.float32, .* torch.float16"):
        grouped_gemm(rows, weight.half(), offsets)
    with pytest.raises(ValueError, match=r"`expert_offsets` must be torch.int64, .* torch.int32"):
        grouped_gemm(rows, weight, offsets.int())


@pytest.mark.skipif(not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("counts", "dim", "out_dim"), [*SHAPES, pytest.param([16, 17, 1], 7, 530, id="column-blocks")]
)
def test_compiled_products_of_few_rows_follow_the_definition(
    counts, dim, out_dim, dtype, tolerance
):
    rows, weight, offsets = (tensor.detach() for tensor in make(counts, dim, out_dim, dtype))
    with poisoned_memory():
        ours = _products.CompiledProducts(offsets).multiply(rows, weight, relu=True)
    expected = reference.grouped_gemm(rows, weight, offsets).relu()
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    turned = _products.CompiledProducts(offsets).multiply(rows, weight.mT.contiguous().mT)
    torch.testing.assert_close(turned.relu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled")
def test_the_compiled_product_of_a_row_does_not_depend_on_other_rows():
    rows, weight, _ = (tensor.detach() for tensor in make([9], 33, 300, torch.float32))
    whole = _products.CompiledProducts(offsets_of([9])).multiply(rows, weight)
    for row in range(9):
        alone = _products.CompiledProducts(offsets_of([1])).multiply(rows[row : row + 1], weight)
        assert alone[0].equal(whole[row])
