"""Merge a checkpoint and its expert files into one file, or split its experts into files."""

from pathlib import Path
from typing import Any

from nmt_moe.checkpoints.expert_files import ByIndex, rows_of, write_expert_file
from nmt_moe.checkpoints.files import check_output, write_whole
from nmt_moe.checkpoints.manifest import MANIFEST, expert_names, make_manifest, new_save_id
from nmt_moe.checkpoints.reader import load_checkpoint
from nmt_moe.checks import check_divisor


def merge(path: Path, output: Path, is_overwritten: bool = False) -> None:
    """Write a checkpoint, with its experts and their optimizer state, as one file.

    Args:
        path: The checkpoint to read, with expert files beside it.
        output: The file to write.
        is_overwritten: Whether to replace an existing output.

    Raises:
        ValueError: if the checkpoint is incomplete, or the output already exists.
    """
    check_output(output, is_overwritten)
    write_whole(output, load_checkpoint(path))


def split(path: Path, output: Path, num_files: int, is_overwritten: bool = False) -> None:
    """Write a checkpoint with its experts in `num_files` files beside it.

    Args:
        path: The checkpoint to read.
        output: The checkpoint to write; the expert files are written to its folder.
        num_files: Number of expert files, a divisor of the number of experts.
        is_overwritten: Whether to replace an existing output.

    Raises:
        ValueError: if the checkpoint is incomplete or has no experts, `num_files` does not divide
            their number, or the output already exists.
    """
    check_output(output, is_overwritten)
    state = load_checkpoint(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    split_checkpoint(state, output, num_files)


def split_checkpoint(state: dict[str, Any], path: Path, num_files: int) -> None:
    """Write the contents of a complete checkpoint as a checkpoint with expert files.

    Args:
        state: Contents of the checkpoint, with all experts; changed in place.
        path: The checkpoint to write; the expert files are written to its folder.
        num_files: Number of expert files, a divisor of the number of experts.

    Raises:
        ValueError: if the checkpoint does not say which of its parameters are experts, its layers
            differ in their number of experts, or `num_files` does not divide this number.
    """
    names = expert_names(path, state)
    if not names:
        raise ValueError(
            "the checkpoint does not say which of its parameters are experts. Either it has none, "
            "or it was trained with the flat gradients of --fp16 or with an older version. If it "
            "has experts, train it for one more update."
        )
    counts = {len(state["model"][name]) for name in names.values()}
    if len(counts) > 1:
        raise ValueError(
            f"the checkpoint has layers with {min(counts)} and {max(counts)} experts, which cannot "
            "be split into the same files. Keep the checkpoint in one file."
        )
    num_experts = counts.pop()
    check_divisor("--files", num_files, "`num_experts`", num_experts)
    save_id, share = new_save_id(), num_experts // num_files
    model = {name: state["model"].pop(name) for name in names.values()}
    optimizer: ByIndex = {}
    states = (state.get("last_optimizer_state") or {}).get("state", {})
    for index in names:
        rows = rows_of(states.get(index, {}), num_experts)
        optimizer[index] = {name: states[index].pop(name) for name in rows}
    entries = []
    for start in range(0, num_experts, share):
        owned = slice(start, start + share)
        parts = {name: value[owned].clone() for name, value in model.items()}
        of_optimizer = {
            index: {name: value[owned].clone() for name, value in values.items()}
            for index, values in optimizer.items()
        }
        entries.append(write_expert_file(path.parent, save_id, owned, parts, of_optimizer))
    state[MANIFEST] = make_manifest(save_id, entries)
    write_whole(path, state)
