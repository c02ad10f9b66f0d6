"""Matrix products on the CPU, compared with torch in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.kernels import has_compiled_loops, linear
from nmt_moe.kernels._cpu import load
from nmt_moe.kernels._matmul import matmul, multiply_into

needs_loops = pytest.mark.skipif(
    not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled"
)
# C, M, K, N. The right side is copied in several parts in the last case but one, and a transposed
# left side in the last case.
SIZES = [
    (1, 1, 1, 1),
    (3, 5, 7, 9),
    (2, 13, 16, 16),
    (1, 97, 33, 31),
    (4, 40, 50, 70),
    (1, 30, 2100, 40),
    (2, 3000, 700, 17),
]


def lay_out(matrix: Tensor, layout: str) -> Tensor:
    """Return the same matrices with different strides."""
    if layout == "transposed":
        return matrix.mT.contiguous().mT
    if layout == "part":
        return F.pad(matrix, (3, 2, 1, 0))[:, 1:, 3 : 3 + matrix.shape[2]]
    if layout == "spread":
        return matrix.repeat_interleave(2, dim=2)[:, :, ::2]
    return matrix


@needs_loops
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("left_layout", ["plain", "transposed", "part", "spread"])
@pytest.mark.parametrize("right_layout", ["plain", "transposed", "part", "spread"])
def test_products_are_those_of_float64(sizes, left_layout, right_layout):
    torch.manual_seed(1)
    batches, rows, inner, width = sizes
    left, right = torch.randn(batches, rows, inner), torch.randn(batches, inner, width)
    expected = left.double() @ right.double()
    out = torch.full((batches, rows, width), torch.nan)
    wide = torch.full((batches, rows, width + 5), 7.0)
    operands = lay_out(left, left_layout), lay_out(right, right_layout)
    load().multiply_matrices(*operands, out, False, False)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * inner}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    load().multiply_matrices(*operands, out, True, True)
    torch.testing.assert_close(out.double(), (2 * expected).relu(), **tolerance)
    part = wide[:, :, 2 : 2 + width]  # only this part is written
    load().multiply_matrices(*operands, part, False, False)
    torch.testing.assert_close(part.double(), expected, **tolerance)
    assert wide[:, :, :2].eq(7).all()
    assert wide[:, :, 2 + width :].eq(7).all()


@needs_loops
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_change_products(threads):
    torch.manual_seed(1)
    left, right = torch.randn(2, 130, 90).mT, torch.randn(2, 130, 200)
    results, before = [], torch.get_num_threads()
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            out = torch.empty(2, 90, 200)
            load().multiply_matrices(left, right, out, False, False)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1])


@needs_loops
def test_empty_products():
    out = torch.ones(2, 3, 4)
    load().multiply_matrices(torch.ones(2, 3, 0), torch.ones(2, 0, 4), out, True, False)
    assert out.eq(1).all()
    load().multiply_matrices(torch.ones(2, 3, 0), torch.ones(2, 0, 4), out, False, False)
    assert out.eq(0).all()
    for sizes in ((0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 5, 0)):
        batches, rows, inner, width = sizes
        out = torch.empty(batches, rows, width)
        operands = torch.ones(batches, rows, inner), torch.ones(batches, inner, width)
        load().multiply_matrices(*operands, out, False, False)


@needs_loops
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 5), (2, 4, 6), (2, 3, 6)),
        ((2, 3, 5), (1, 5, 6), (2, 3, 6)),
        ((2, 3, 5), (2, 5, 6), (2, 3, 7)),
    ],
)
def test_mismatched_shapes_are_refused(shapes):
    left, right, out = map(torch.ones, shapes)
    with pytest.raises(ValueError, match="do not match"):
        load().multiply_matrices(left, right, out, False, False)


@needs_loops
def test_infinities_and_nan_stay_in_their_rows_and_columns():
    left, right = torch.ones(1, 40, 8), torch.ones(1, 8, 40)
    left[0, 3, 2], right[0, 5, 20] = torch.nan, torch.inf
    out = torch.empty(1, 40, 40)
    load().multiply_matrices(left, right, out, False, False)
    assert out[0, 3].isnan().all()
    others = torch.arange(40) != 3
    assert out[0, others, 20].isinf().all()
    assert out[0][others][:, torch.arange(40) != 20].eq(8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_batch", [False, True])
def test_products_in_place(dtype, is_batch):
    torch.manual_seed(1)
    shape = (2,) if is_batch else ()
    left, right = torch.randn(*shape, 6, 5).to(dtype), torch.randn(*shape, 5, 7).to(dtype)
    out = torch.empty(*shape, 6, 7, dtype=dtype)
    expected = left.double() @ right.double()
    tolerance = {"rtol": 0, "atol": 0.1 if dtype == torch.bfloat16 else 1e-5}
    assert multiply_into(out, left, right) is out
    torch.testing.assert_close(out.double(), expected, **tolerance)
    multiply_into(out, left, right, accumulate=True)
    torch.testing.assert_close(out.double(), 2 * expected, **tolerance)
    multiply_into(out, left, right, relu=True)
    torch.testing.assert_close(out.double(), expected.relu(), **tolerance)
    if not is_batch:
        torch.testing.assert_close(matmul(left, right).double(), expected, **tolerance)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 4, 5)])
def test_linear_is_torchs(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y = linear(x, weight)
    assert y.equal(F.linear(x, weight)) or y.allclose(F.linear(x, weight), rtol=1e-13)
    assert torch.autograd.gradcheck(linear, (x, weight))
    single = linear(x.float().detach(), weight.float().detach())
    torch.testing.assert_close(single.double(), y, rtol=1e-5, atol=1e-5)


def test_linear_follows_autocast():
    x, weight = torch.randn(3, 5), torch.randn(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
