"""Recycled memory is never shared by live tensors, and does not accumulate."""

import gc
import mmap

import pytest
import torch

from nmt_moe.kernels import _memory

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages"
)
LIKE = torch.empty(0)
LARGE = (3, _memory.SMALLEST_BYTES // 4)  # 12 MiB


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    pool = _memory._Pool()
    monkeypatch.setattr(_memory, "_POOL", pool)
    return pool


def test_a_freed_tensors_memory_is_used_for_the_next_one(pool):
    first = _memory.empty(LARGE, LIKE)
    address = first.data_ptr()
    view = first[1]
    del first
    gc.collect()
    assert pool.waiting == []  # the view is alive
    del view
    gc.collect()
    assert len(pool.waiting) == 1
    assert _memory.empty(LARGE, LIKE).data_ptr() == address


def test_live_tensors_do_not_share_memory(pool):
    first, second = (_memory.empty(LARGE, LIKE).fill_(i) for i in range(2))
    assert first.eq(0).all()
    assert second.eq(1).all()


def test_no_more_is_kept_than_was_in_use_at_one_time(pool):
    for rows in range(3, 12):
        tensor = _memory.empty((rows, LARGE[1]), LIKE)
        del tensor
        gc.collect()
        assert pool.bytes_used == 0
        assert pool.bytes_waiting <= pool.most_bytes_used == 4 * rows * LARGE[1]
    assert sum(map(len, pool.waiting)) == pool.bytes_waiting


def test_a_much_smaller_tensor_does_not_take_a_large_block(pool):
    large = _memory.empty((12, LARGE[1]), LIKE)
    del large
    gc.collect()
    small = _memory.empty((1, LARGE[1]), LIKE)
    assert len(pool.waiting) <= 1
    assert pool.bytes_used == 4 * small.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shape_and_dtype_are_those_requested(dtype):
    tensor = _memory.empty(LARGE, LIKE.to(dtype))
    assert tensor.shape == LARGE
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()


def test_small_tensors_come_from_torch(pool):
    _memory.empty((2, 3), LIKE)
    assert pool.most_bytes_used == 0


def test_a_gradient_in_recycled_memory_outlives_the_next_backward_pass():
    weight = torch.ones(LARGE, requires_grad=True)

    class Fill(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, value):
            ctx.value = value
            return weight.sum()

        @staticmethod
        def backward(ctx, grad):
            return _memory.empty(LARGE, LIKE).fill_(ctx.value), None

    Fill.apply(weight, 1.0).backward()
    kept = weight.grad
    weight.grad = None
    Fill.apply(weight, 2.0).backward()
    assert kept.eq(1).all()
    assert weight.grad.eq(2).all()
