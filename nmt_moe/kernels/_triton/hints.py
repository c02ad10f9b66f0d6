"""Tell the compiler facts that it cannot derive itself."""

import triton
import triton.language as tl


@triton.jit
def whole(number, MULTIPLE: tl.constexpr):
    """Return the same number, which the compiler then knows to be a multiple of MULTIPLE."""
    return number // MULTIPLE * MULTIPLE
