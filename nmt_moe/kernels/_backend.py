"""Functions that determine how an operation runs, such as whether it uses Triton kernels."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

# Triton's interpreter runs kernels on CPU tensors. It is slow, so it is used only for tests and
# debugging.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Device types whose tensors the host can read without waiting, and device types that run the Triton
# kernels.
HOST_DEVICES, TRITON_DEVICES = frozenset({"cpu"}), frozenset({"cuda"})


@cache
def has_triton() -> bool:
    """Return whether Triton is installed. CUDA builds of torch for Linux include it."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(tensor: Tensor, kernel: str) -> bool:
    """Return whether an operation on `tensor` runs a Triton kernel.

    On CUDA, it does if the kernel passes its trial. The trial runs when this function is first
    called for the kernel. float64 always runs in torch, because the kernels accumulate in float32.
    If the environment variable NMT_MOE_KERNELS is set, it decides instead of the trial.

    Args:
        tensor: The operation's main operand.
        kernel: Name of the kernel, a key of `_trial.TRIALS`.

    Raises:
        ValueError: if NMT_MOE_KERNELS is neither "torch" nor "triton", or if it is "triton" and
            Triton is not installed.
    """
    forced = os.environ.get("NMT_MOE_KERNELS", "")
    if forced not in ("", "torch", "triton"):
        raise ValueError(
            f"NMT_MOE_KERNELS must be torch or triton, but is {forced!r}. If it is not set, each "
            "Triton kernel runs if it passes a trial."
        )
    is_fit = tensor.device.type in TRITON_DEVICES and tensor.dtype != torch.float64
    if forced == "torch" or not is_fit:
        return False
    if not has_triton():
        if forced:
            raise ValueError(
                f"NMT_MOE_KERNELS is {forced}, but Triton is not installed. Run `pip install "
                "triton`, or unset NMT_MOE_KERNELS to use torch's own operations."
            )
        return False
    if forced:
        return True
    from nmt_moe.kernels import _trial  # imported here because it imports this module's callers

    return _trial.is_sound(kernel, tensor.device, tensor.dtype)


def is_on_host(tensor: Tensor) -> bool:
    """Return whether the host can read the values of `tensor` without waiting for a device."""
    return tensor.device.type in HOST_DEVICES


def is_captured(tensor: Tensor) -> bool:
    """Return whether CUDA is capturing a graph, so that nothing may wait for `tensor`."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def needs_gradient(*tensors: Tensor) -> bool:
    """Return whether an operation on `tensors` may need a backward pass.

    A `torch.autograd.Function` cannot find this out itself: gradients are disabled inside it, and
    its `needs_input_grad` ignores a surrounding `torch.no_grad`.
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def row_groups(row_offsets: Tensor, num_rows: int) -> Tensor:
    """Return the group of each row, (N,) int64. Group g owns rows [offsets[g], offsets[g + 1]).

    Rows that belong to no group are assigned to the last group.
    """
    rows = torch.arange(num_rows, device=row_offsets.device)
    groups = torch.searchsorted(row_offsets, rows, right=True) - 1
    return groups.clamp_(max=len(row_offsets) - 2)
