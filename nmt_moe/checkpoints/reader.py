"""Read checkpoints for all other code in the project."""

from pathlib import Path
from typing import Any

from torch import Tensor

from nmt_moe.checkpoints.expert_files import restore_experts
from nmt_moe.checkpoints.files import COPY_AGAIN, check_finite_values, read_file, shown
from nmt_moe.checkpoints.manifest import MANIFEST, check_manifest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint, without the expert files beside it.

    Nothing in the file is executed, and CRCs are compared. Values must not take more bytes than the
    file, parameters must be plain tensors with finite values, and a manifest must be complete.

    Raises:
        ValueError: if the file is missing or damaged, or is not a fairseq checkpoint.
    """
    state = read_file(path)
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"`{path}` has no `model`, so it is not a fairseq checkpoint")
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"`{path}` has a parameter {shown(name)} that is not a named tensor. {COPY_AGAIN}"
            )
    if not isinstance(state.get("last_optimizer_state"), dict | None):
        raise ValueError(f"`{path}` has an optimizer state that is not a dictionary. {COPY_AGAIN}")
    check_finite_values(path, model, "model")
    check_finite_values(path, state.get("last_optimizer_state"), "last_optimizer_state")
    if state.get(MANIFEST) is not None:
        check_manifest(path, state)
    return state


def load_checkpoint(path: Path, with_optimizer: bool = True) -> dict[str, Any]:
    """Read and check a checkpoint with all its experts.

    Args:
        path: Path of the checkpoint; expert files are read from its folder.
        with_optimizer: Whether to also read the optimizer state from expert files.

    Raises:
        ValueError: if a file is missing or damaged, or does not match. The message names it.
    """
    state = read_checkpoint(path)
    restore_experts(path, state, with_optimizer=with_optimizer)
    return state


def count_updates(path: Path) -> int:
    """Return the number of updates recorded in a checkpoint's header.

    Raises:
        ValueError: if the file cannot be read or does not contain the number.
    """
    state = read_file(path, is_header_only=True)
    try:
        return int(state["optimizer_history"][-1]["num_updates"])
    except (LookupError, TypeError, ValueError):
        raise ValueError(
            f"`{path}` does not say after how many updates it was saved. {COPY_AGAIN}"
        ) from None
