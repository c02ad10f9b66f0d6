"""Tell the compiler what it cannot see by itself."""

import triton
import triton.language as tl


@triton.jit
def whole(number, MULTIPLE: tl.constexpr):
    """Return the same number, which the compiler then knows to be a multiple."""
    return number // MULTIPLE * MULTIPLE
