"""Products as a GPU's tensor cores compute them, for Triton's interpreter, which does not round."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_to_tf32(numbers: np.ndarray) -> np.ndarray:
    """Round float32 numbers to 10 bits after the first (to the nearest, with ties away from 0)."""
    return ((numbers.view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32)


def multiply_tf32(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply float32 matrices in TF32."""
    return np.matmul(round_to_tf32(left), round_to_tf32(right))


def multiply_tf32x3(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply float32 matrices in three TF32 products, as Triton's compiler does.

    Each number is split into the nearest TF32 number and a remainder. The product of the two
    remainders is too small to matter. If a remainder is NaN, because its number is infinite, its
    products count as 0.
    """
    with np.errstate(invalid="ignore"):
        big = [round_to_tf32(numbers) for numbers in (left, right)]
        small = [numbers - part for numbers, part in zip((left, right), big, strict=True)]
        rest = multiply_tf32(small[0], big[1]) + multiply_tf32(big[0], small[1])
        return np.nan_to_num(rest, nan=0.0, posinf=np.inf, neginf=-np.inf) + np.matmul(*big)


@contextmanager
def simulated_rounding() -> Iterator[set[str]]:
    """Make the interpreter round float32 as `tl.dot` is told to; yield the precisions used so far.

    Sums are in float32, as on a GPU, but in a different order.
    """
    used: set[str] = set()
    ways = {"TF32": multiply_tf32, "TF32x3": multiply_tf32x3, "IEEE": np.matmul}

    def create_dot(_: Any, a: Any, b: Any, d: Any, precision: Any, *_rest: Any) -> TensorHandle:
        used.add(precision.name)
        product = ways[precision.name](*map(np.ascontiguousarray, (a.data, b.data)))
        return TensorHandle(product + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield used
