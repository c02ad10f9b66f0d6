"""Reuse the memory of large CPU tensors instead of returning it to the system.

Every new page causes a page fault, and the system fills the page with zeros. For the gradient of
many experts with few tokens each, this takes as much time as the products that compute it. torch
returns large CPU blocks to the system as soon as they are freed, so every training step would incur
this cost again.

Only memory that grows with the number of experts is reused. LSTM states have many different sizes,
so they rarely fit a free block, and reusing their memory would slow training down
(benchmarks/results/cpu.md).
"""

import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Minimum size of a tensor for its memory to be reused. For smaller tensors, torch's own allocation
# is just as fast.
SMALLEST_BYTES = 1 << 22
# Size of a huge page on x86-64 and arm64.
PAGE_BYTES = 1 << 21


class _Pool:
    """Memory blocks of freed tensors, waiting to hold other tensors.

    The total size of the blocks in use and waiting never exceeds the largest size that was ever in
    use.
    """

    def __init__(self) -> None:
        self.waiting: list[mmap.mmap] = []  # longest waiting first
        self.bytes_used = self.bytes_waiting = self.most_bytes_used = 0
        # A tensor may be freed in any thread, even while this thread is inside `take`.
        self.lock = threading.RLock()

    def take(self, size: int) -> mmap.mmap:
        """Return a block of at least `size` bytes, where `size` is a multiple of `PAGE_BYTES`."""
        with self.lock:
            fitting = [block for block in self.waiting if size <= len(block) <= 2 * size]
            block = min(fitting, key=len, default=None)
            if block is None:
                block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                block.madvise(mmap.MADV_HUGEPAGE)
            else:
                self.waiting.remove(block)
                self.bytes_waiting -= len(block)
            self.bytes_used += len(block)
            self.most_bytes_used = max(self.most_bytes_used, self.bytes_used)
            while self.bytes_used + self.bytes_waiting > self.most_bytes_used:
                self.bytes_waiting -= len(self.waiting.pop(0))
            return block

    def give_back(self, block: mmap.mmap) -> None:
        """Keep the block of a freed tensor."""
        with self.lock:
            self.waiting.append(block)
            self.bytes_used -= len(block)
            self.bytes_waiting += len(block)


_POOL = _Pool()


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor, like `torch.empty`, with the dtype and device of `like`.

    Large tensors on the CPU use recycled memory, in huge pages if the system has them.
    """
    size = math.prod(shape) * like.element_size()
    is_elsewhere = like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE")
    if is_elsewhere or size < SMALLEST_BYTES:
        return like.new_empty(shape)
    block = _POOL.take(math.ceil(size / PAGE_BYTES) * PAGE_BYTES)
    # Only the tensor keeps this array alive, so the array is freed with the tensor's memory.
    owner = np.frombuffer(block, dtype=np.uint8)
    weakref.finalize(owner, _POOL.give_back, block).atexit = False
    return torch.frombuffer(owner, dtype=like.dtype, count=math.prod(shape)).view(*shape)
