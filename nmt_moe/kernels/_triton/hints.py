"""Give the compiler facts that it cannot derive itself."""

import triton
import triton.language as tl


@triton.jit
def whole(number, MULTIPLE: tl.constexpr):
    """Return `number`, and tell the compiler that it is a multiple of MULTIPLE."""
    return number // MULTIPLE * MULTIPLE
