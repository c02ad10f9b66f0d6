"""Answer what operations ask about tensors: which path runs them, whether gradients follow."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

# Triton's interpreter runs kernels on CPU tensors, slowly: only for tests and debugging.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Types of devices whose tensors the host reads without waiting, and on which Triton's kernels run.
HOST_DEVICES, TRITON_DEVICES = frozenset({"cpu"}), frozenset({"cuda"})


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; CUDA builds of torch bring it along on Linux."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(tensor: Tensor, kernel: str) -> bool:
    """Return whether an operation on `tensor` runs Triton's kernel: on CUDA, where it works.

    float64 stays with torch: the kernels add up in float32.

    Args:
        tensor: The operation's main operand.
        kernel: Name of the kernel, a key of `_trial.TRIALS`; it is tried when it is first asked
            for.

    Raises:
        ValueError: if NMT_MOE_KERNELS asks for something else than "torch" or "triton", or for
            Triton where it is not installed.
    """
    forced = os.environ.get("NMT_MOE_KERNELS", "")
    if forced not in ("", "torch", "triton"):
        raise ValueError(
            f"NMT_MOE_KERNELS must be torch or triton, but is {forced!r}. Unset it, and each of "
            "Triton's kernels runs where it passes a trial."
        )
    is_fit = tensor.device.type in TRITON_DEVICES and tensor.dtype != torch.float64
    if forced == "torch" or not is_fit:
        return False
    if not has_triton():
        if forced:
            raise ValueError(
                f"NMT_MOE_KERNELS is {forced}, but Triton is not installed: pip install triton, or "
                "unset NMT_MOE_KERNELS to run torch's own operations."
            )
        return False
    if forced:
        return True
    from nmt_moe.kernels import _trial  # which needs all that asks here

    return _trial.is_sound(kernel, tensor.device, tensor.dtype)


def is_on_host(tensor: Tensor) -> bool:
    """Return whether the host can read the values of `tensor` without waiting for a device."""
    return tensor.device.type in HOST_DEVICES


def needs_gradient(*tensors: Tensor) -> bool:
    """Return whether a backward pass through an operation on `tensors` may come.

    Inside a `Function` gradients are off, and its flags say nothing of a surrounding no_grad.
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def row_groups(row_offsets: Tensor, num_rows: int) -> Tensor:
    """Return the group of each row, (N,) int64; group g owns rows [offsets[g], offsets[g + 1]).

    Rows of no group count as the last one's.
    """
    rows = torch.arange(num_rows, device=row_offsets.device)
    groups = torch.searchsorted(row_offsets, rows, right=True) - 1
    return groups.clamp_(max=len(row_offsets) - 2)
