"""Find the compiled library, and load it once, when an operation first needs it."""

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
# Tensor classes that the loops accept. Other classes define their own operations.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def library_path() -> Path:
    """Return the path of the library, whether or not it has been built.

    The name contains a digest of the sources, the processor's architecture, and torch's version,
    because torch's C++ interface differs between versions.
    """
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    name = f"nmt_moe-{digest.hexdigest()[:12]}-torch{torch.__version__}-{platform.machine()}.so"
    return FOLDER / name


@cache
def load() -> Any:
    """Return the library's operators, or None if torch's own operations are to be used.

    The result is None if the library has not been built, or if `NMT_MOE_KERNELS=torch` is set.
    """
    if os.environ.get(CHOICE) == "torch" or not library_path().exists():
        return None
    torch.ops.load_library(str(library_path()))
    operators = torch.ops.nmt_moe
    names = (
        *("lstm_step", "lstm_forward", "lstm_backward"),
        *("attentive_forward", "attentive_backward", "multiply_experts"),
        *("multiply_matrices", "multiply_into"),
        *("cross_entropy", "cross_entropy_backward", "factored_adam"),
        *("multiply_panels", "packed_lstm_step", "packed_lstm", "attend_rows"),
        *("choose_experts", "mix_experts", "sigmoid_residual", "tanh"),
        *("log_probabilities", "log_softmax", "best_candidates", "next_rows"),
    )
    # Store the only overload of each operator, because looking it up takes as long as a small step.
    return SimpleNamespace(**{name: getattr(operators, name).default for name in names})


def has_compiled_loops(*tensors: torch.Tensor | None) -> bool:
    """Return whether the library has loops for these tensors, which may include None.

    It has them for plain tensors on the CPU that are all float32 or all float64, but not under
    autocast, which requires products in half precision.
    """
    return not torch.is_autocast_enabled("cpu") and has_loops_for(*tensors)


def has_loops_for(*tensors: torch.Tensor | None) -> bool:
    """Return the same as `has_compiled_loops`, regardless of autocast."""
    if load() is None:
        return False
    dtype = None
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = dtype or tensor.dtype
        if tensor.dtype != dtype or not tensor.is_cpu or type(tensor) not in PLAIN:
            return False
    return dtype in DTYPES
