"""Check arguments. Each error message says what is wrong and what is expected.

This module does not import torch, so that commands can check their options before importing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Reject a number outside `[low, high]`, NaN, and anything that is not a number.

    Raises:
        ValueError: if the value is rejected; the message names the option, the bounds and the
            value.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"`{name}` must be a number, but is {value!r}.")
    if high is None:
        if not value >= low:
            raise ValueError(f"`{name}` must be at least {low}, but is {value}.")
    elif not low <= value <= high:
        raise ValueError(f"`{name}` must be from {low} to {high}, but is {value}.")


def check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Reject anything that is not an integer from `low` to `high`.

    Raises:
        ValueError: if the value is rejected; the message names the option, the constraint and
            the value.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number (an int), but is {value!r}.")
    check_range(name, value, low, high)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Reject a name that is not one of `choices`.

    Raises:
        ValueError: if the value is rejected; the message names the option, the value and all
            choices.
    """
    if value not in choices:
        known = ", ".join(f"'{choice}'" for choice in choices)
        raise ValueError(f"`{name}` must be one of {known}, but is '{value}'.")


def check_divides(name: str, value: int, what: str, divisor: int) -> None:
    """Reject a `value` that is not a positive multiple of `divisor`, which is at least 1.

    Raises:
        ValueError: if the value is rejected; the message names both numbers and the nearest allowed
            values.
    """
    if value < 1 or value % divisor:
        below = value - value % divisor
        ways = f"{below} or {below + divisor}" if below > 0 else f"{divisor}"
        raise ValueError(
            f"`{name}` must be a multiple of {what}, {divisor}, but is {value}. Use {ways}."
        )


def check_divisor(name: str, value: int, what: str, number: int) -> None:
    """Reject a `value` that does not divide `number`.

    Raises:
        ValueError: if the value is rejected; the message names both numbers and the allowed values.
    """
    check_whole(name, value, 1)
    if number % value:
        divisors = [str(n) for n in range(1, number + 1) if number % n == 0]
        ways = ", ".join(divisors[:-1]) + f" or {divisors[-1]}"
        raise ValueError(f"`{name}` must divide {what}, {number}, but is {value}. Use {ways}.")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None], letters: str) -> None:
    """Reject a tensor that does not have the given shape; None in `shape` stands for any size.

    Raises:
        ValueError: if the shape differs; the message names the tensor, the required shape in
            letters and numbers, and its actual shape.
    """
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"`{name}` must have the shape {letters} = ({wanted}), but has {tuple(tensor.shape)}."
        )


def check_like(name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> None:
    """Reject a tensor with the wrong dtype or device; if `dtype` is None, accept any float dtype.

    Raises:
        ValueError: if the tensor is rejected; the message names it and gives its required and
            actual properties.
    """
    if dtype is None and not tensor.is_floating_point():
        raise ValueError(f"`{name}` must be floating-point, but is {tensor.dtype}.")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(
            f"`{name}` must be {dtype}, but is {tensor.dtype}. Convert it: `{name}.to({dtype})`."
        )
    if tensor.device != device:
        raise ValueError(
            f"`{name}` must be on {device}, but is on {tensor.device}. "
            f"Move it: `{name}.to('{device}')`."
        )


def check_finite(what: str, values: Tensor) -> None:
    """Reject infinities and NaN.

    Raises:
        FloatingPointError: if there are any; the message names the values and gives advice.
    """
    if not values.isfinite().all():
        raise FloatingPointError(
            f"There are infinities or NaN in {what}. Look for the first layer that produces "
            "them. During training, a lower learning rate or gradient clipping usually "
            "helps."
        )


def describe_os_error(error: OSError) -> str:
    """Return an error's message, which names the file and the reason if the system gave them."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"`{error.filename}`: {error.strerror}. Check the path."
