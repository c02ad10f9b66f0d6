"""Find the compiled library and load it, once, when the first operation asks."""

import hashlib
import os
import platform
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SOURCES = Path(__file__).parent
# Folder of the library that `build` compiles.
FOLDER = SOURCES / "lib"
CHOICE = "NMT_MOE_KERNELS"
DTYPES = (torch.float32, torch.float64)
# The classes of tensors that the loops accept; others have operations of their own.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def library_path() -> Path:
    """Return where the library for this torch and this kind of processor is, or would be.

    torch's C++ interface changes with its version, so another torch does not find it; nor does
    another version of the sources.
    """
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    name = f"nmt_moe-{digest.hexdigest()[:12]}-torch{torch.__version__}-{platform.machine()}.so"
    return FOLDER / name


@cache
def load() -> Any:
    """Return the library's operators, or None where torch's own operations do the work.

    That is where the library was not built, and where `NMT_MOE_KERNELS=torch` says so.
    """
    if os.environ.get(CHOICE) == "torch" or not library_path().exists():
        return None
    torch.ops.load_library(str(library_path()))
    operators = torch.ops.nmt_moe
    names = (
        *("lstm_step", "lstm_forward", "lstm_backward"),
        *("attentive_forward", "attentive_backward", "multiply_experts"),
        *("cross_entropy", "cross_entropy_backward", "factored_adam"),
    )
    # Return the only overload of each: looking up the right one takes as long as a small step.
    return SimpleNamespace(**{name: getattr(operators, name).default for name in names})


def has_compiled_loops(*tensors: torch.Tensor | None) -> bool:
    """Return whether the library has loops for these tensors: float32 or float64 of the CPU.

    Not under autocast, which wants products in half precision, nor for tensors without memory.
    """
    if load() is None or torch.is_autocast_enabled("cpu"):
        return False
    dtype = None
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = dtype or tensor.dtype
        if tensor.dtype != dtype or not tensor.is_cpu or type(tensor) not in PLAIN:
            return False
    return dtype in DTYPES
