"""Products with packed weights are exact for integers, close to float64, and need no FBGEMM."""

import pytest
import torch

from nmt_moe.kernels import PackedLinear, quantise_rows, quantised

SHAPES = [  # (rows, inputs, outputs)
    pytest.param(5, 512, 2048, id="a-beam"),
    pytest.param(1, 64, 32, id="one-row"),
    pytest.param(70, 33, 7, id="nothing-is-a-power-of-two"),
    pytest.param(0, 512, 1024, id="no-rows"),
]


@pytest.fixture(params=["tiles", "fbgemm", "fallback"])
def with_and_without_fbgemm(request, monkeypatch):
    """Use the products for large matrices at all sizes: with tiles, with FBGEMM or with neither."""
    for name in ("PACKED_FROM", "NARROW_FROM"):
        monkeypatch.setattr(quantised, name, 0)
    if request.param == "tiles":
        if not quantised.has_tiles():
            pytest.skip("the processor does not have AMX")
    else:
        monkeypatch.setattr(quantised, "has_tiles", lambda: False)
    if request.param == "fallback":
        monkeypatch.setattr(quantised, "has_fbgemm", lambda: False)
    elif not quantised.has_fbgemm():
        pytest.skip("this build of torch does not have FBGEMM")
    return request.param


def draw(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(rows, inputs), torch.randn(outputs, inputs) * 0.1, torch.randn(outputs)


def test_rows_are_rounded_to_the_nearest_of_255_levels():
    weight = torch.tensor([[127.0, -127.0, 0.4, 0.6], [0.5, -0.25, 0.0, 0.0], [0.0] * 4])
    levels, scale = quantise_rows(weight)
    assert levels.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert levels.tolist() == [[127, -127, 0, 1], [127, -64, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.5 / 127, 0.0]))


def test_stacked_experts_are_quantised_one_by_one():
    weight = torch.randn(3, 6, 5, dtype=torch.bfloat16)
    levels, scale = quantise_rows(weight)
    for expert in range(3):
        own_levels, own_scale = quantise_rows(weight[expert])
        assert torch.equal(levels[expert], own_levels)
        assert torch.equal(scale[expert], own_scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_rejected(bad):
    with pytest.raises(ValueError, match="must be finite"):
        quantise_rows(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_int8_equals_the_product_of_the_integers(rows, inputs, outputs, with_and_without_fbgemm):
    torch.manual_seed(1)
    largest = quantised.activation_levels()
    x = torch.randint(-largest, largest + 1, (rows, inputs))
    x[:, 0] = largest  # makes the scale of each row 1
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    # Sums of two products of the largest values would exceed 16 bits.
    x[:1], weight[:1] = largest, 127
    scale = torch.rand(outputs) + 0.1
    y = PackedLinear.from_int8(weight, scale)(x.float())
    expected = (x @ weight.long().t()).double() * scale
    atol = 1e-3
    if with_and_without_fbgemm == "fallback":  # the fallback sums in float32
        atol += 1e-6 * inputs * largest * 127
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_int8_errs_by_at_most_half_a_level(rows, inputs, outputs, with_and_without_fbgemm):
    x, weight, bias = draw(rows, inputs, outputs)
    y = PackedLinear.pack(weight, bias, "int8")(x)
    assert y.dtype == torch.float32
    expected = x.double() @ weight.double().t() + bias
    levels, scale = quantise_rows(weight)
    x_error = x.abs().amax(1, keepdim=True) / quantised.activation_levels() / 2
    bound = x_error * (levels.abs().sum(1) * scale) + x.abs().sum(1, keepdim=True) * scale / 2
    assert ((y - expected).abs() <= bound * 1.001 + 1e-4).all()


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_floating_point_weights(rows, inputs, outputs, dtype, rtol, with_and_without_fbgemm):
    x, weight, bias = draw(rows, inputs, outputs)
    y = PackedLinear.pack(weight, bias, dtype)(x)
    assert y.dtype == torch.float32
    expected = x.double() @ weight.double().t() + bias
    assert (y - expected).abs().max().item() <= rtol * (inputs**0.5) if rows else y.shape[0] == 0


@pytest.mark.parametrize("dtype", quantised.DTYPES)
def test_small_matrices_are_multiplied_in_float32(dtype):
    x, weight, bias = draw(6, 16, 8)
    if dtype == "int8":
        levels, scale = quantise_rows(weight)
        expected = x @ (levels * scale[:, None]).t() + bias
    else:
        expected = x @ weight.to(getattr(torch, dtype)).float().t() + bias
    torch.testing.assert_close(PackedLinear.pack(weight, bias, dtype)(x), expected)


@pytest.mark.parametrize("dtype", quantised.DTYPES)
@pytest.mark.parametrize("rows", [1, 6])
def test_an_addend_takes_the_place_of_a_bias(dtype, rows, with_and_without_fbgemm):
    x, weight, bias = draw(rows, 16, 8)
    packed, addend = PackedLinear.pack(weight, dtype=dtype), torch.randn(rows, 8)
    product = packed(x)
    torch.testing.assert_close(packed(x, addend), product + addend)
    torch.testing.assert_close(packed(x, bias), product + bias)
    stacked = packed(x.view(rows, 1, 16), addend.view(rows, 1, 8))
    torch.testing.assert_close(stacked[:, 0], product + addend)


def test_weights_beyond_the_range_of_float16_are_kept(with_and_without_fbgemm):
    weight = torch.tensor([[1e6, 0.0]] * 8)
    y = PackedLinear.pack(weight, dtype="bfloat16")(torch.ones(2, 2))
    torch.testing.assert_close(y, torch.full((2, 8), 1e6), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", quantised.DTYPES)
def test_leading_dimensions_are_kept(dtype, with_and_without_fbgemm):
    x, weight, bias = draw(6, 16, 8)
    packed = PackedLinear.pack(weight, bias, dtype)
    y = packed(x.view(2, 3, 16))
    assert y.shape == (2, 3, 8)
    assert packed.shape == (8, 16)
    assert packed.dtype == dtype
    torch.testing.assert_close(y.view(6, 8), packed(x))


def test_a_row_of_int8_does_not_depend_on_its_neighbours(with_and_without_fbgemm):
    x, weight, _ = draw(9, 48, 40)
    x[4] *= 1e3
    packed = PackedLinear.pack(weight, dtype="int8")
    together = packed(x)
    for row in range(9):
        alone = packed(x[row : row + 1])
        if with_and_without_fbgemm != "fallback":
            assert torch.equal(alone[0], together[row])
        else:
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6 * 1e3)


@pytest.mark.parametrize("dtype", quantised.DTYPES)
def test_rows_of_zeros_and_of_nan(dtype, with_and_without_fbgemm):
    x, weight, bias = draw(3, 16, 8)
    weight[2] = 0
    x[0], x[1] = 0, float("nan")
    y = PackedLinear.pack(weight, bias, dtype)(x)
    assert torch.equal(y[0], bias)
    assert y[1].isnan().all()
    assert y[2].isfinite().all()
    assert y[2, 2] == bias[2]


def test_packing_does_not_change_the_quantised_engine():
    before = torch.backends.quantized.engine
    PackedLinear.pack(torch.ones(8, 8), dtype="int8")(torch.ones(1, 8))
    assert torch.backends.quantized.engine == before


def test_packing_causes_no_warning(recwarn):
    for dtype in quantised.DTYPES:
        PackedLinear.pack(torch.ones(8, 8), dtype=dtype)(torch.ones(1, 8))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PackedLinear.pack(torch.ones(2, 2), dtype="float16"), "`dtype` must be one of"),
        (lambda: PackedLinear.pack(torch.ones(2)), r"`weight` must have the shape \(O, I\)"),
        (lambda: PackedLinear.pack(torch.ones(2, 2), torch.ones(3)), "`bias` must have the shape"),
        (
            lambda: PackedLinear.from_int8(torch.ones(2, 2, dtype=torch.int8), torch.ones(3)),
            "`scale` must have the shape",
        ),
    ],
)
def test_mismatched_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
