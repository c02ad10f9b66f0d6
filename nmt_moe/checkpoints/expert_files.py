"""Read and write expert files. Each contains a range of experts and their optimizer state."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmt_moe.checkpoints.files import (
    ATTEMPTS,
    COPY_AGAIN,
    check_finite_values,
    read_file,
    shown,
    write_whole,
)
from nmt_moe.checkpoints.manifest import (
    MANIFEST,
    PREFIX,
    check_manifest,
    expert_file_name,
    expert_names,
    make_manifest,
    new_save_id,
)
from nmt_moe.parallel import (
    ExpertParallelGroup,
    from_first_rank,
    gather_from_ranks,
    is_first_replica,
)
from nmt_moe.text.digests import compute_sha256

# Dtypes of weights in half precision. fairseq saves these weights as float32, but earlier expert
# files kept them in half precision.
HALVES = {torch.float16, torch.bfloat16}
PRECISIONS = ("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16")

ByName = dict[str, Tensor]
ByIndex = dict[int, ByName]


def save_experts(
    folder: Path, num_experts: int, model: ByName, optimizer: ByIndex, group: ExpertParallelGroup
) -> dict[str, Any] | None:
    """Write this rank's experts for a checkpoint that is about to be saved.

    Of the ranks that hold the same experts, only the lowest writes them. All ranks must call this
    function. No rank needs memory for experts other than its own.

    Args:
        folder: Folder of the checkpoint, the same for all ranks.
        num_experts: Number of experts, E.
        model: This rank's parameters of experts, (L, ...), by name.
        optimizer: Optimizer state of these parameters, (L, ...), by the parameter's index in the
            optimizer and the name of the value.
        group: The ranks that together hold every expert once.

    Returns:
        The checkpoint's manifest; None on ranks that leave the writing to another rank.

    Raises:
        FileNotFoundError: if the first rank cannot find a file that another rank wrote.
    """
    if not is_first_replica(group):
        return None
    save_id = from_first_rank(new_save_id(), group)
    folder.mkdir(parents=True, exist_ok=True)
    entry = write_expert_file(folder, save_id, group.owned(num_experts), model, optimizer)
    entries = gather_from_ranks(entry, group)
    for writer, written in enumerate(entries):
        if group.rank == 0 and not (folder / written["name"]).is_file():
            raise FileNotFoundError(
                f"process {writer} wrote `{written['name']}`, but process 0 cannot find it in "
                f"`{folder}`. Name a folder that all machines share."
            )
    return make_manifest(save_id, entries)


def write_expert_file(
    folder: Path, save_id: str, owned: slice, model: ByName, optimizer: ByIndex
) -> dict[str, Any]:
    """Write a range of experts, completely or not at all.

    Args:
        folder: Folder of the checkpoint.
        save_id: Save id of the checkpoint.
        owned: Slice of the experts' global ids.
        model: Parameters of these experts, (L, ...), by name.
        optimizer: Optimizer state of these parameters, (L, ...), by the parameter's index in the
            optimizer and the name of the value.

    Returns:
        The file's entry in the manifest.
    """
    path = folder / expert_file_name(save_id, owned)
    header = {"save_id": save_id, "start": owned.start, "stop": owned.stop}
    write_whole(path, {**header, "model": model, "optimizer": optimizer}, ATTEMPTS)
    return {
        "name": path.name,
        **header,
        "bytes": path.stat().st_size,
        "sha256": compute_sha256(path),
    }


def restore_experts(
    path: Path, state: dict[str, Any], owned: slice | None = None, with_optimizer: bool = True
) -> None:
    """Add experts from their files to a checkpoint that has been read.

    Args:
        path: Path of the checkpoint; its folder contains the expert files.
        state: Contents of the checkpoint; unchanged if they already include the experts.
        owned: Slice of the global ids of the experts to add; None for all. Files without any of
            these experts are not read.
        with_optimizer: Whether to add the optimizer state of these experts as well.

    Raises:
        ValueError: if a file is missing or damaged, comes from another save or does not match
            the checkpoint, or if experts are in no file or in several. The message names the file
            or the experts.
    """
    if state.get(MANIFEST) is None:
        return
    check_manifest(path, state)
    manifest = state.pop(MANIFEST)
    owned = owned or slice(0, manifest["num_experts"])
    entries = [e for e in manifest["files"] if e["start"] < owned.stop and e["stop"] > owned.start]
    parts = [read_expert_file(path, manifest, entry) for entry in entries]
    _check_content(path, state, entries, parts)
    _fill(state["model"], [part["model"] for part in parts], entries, owned)
    saved = state.get("last_optimizer_state")
    if with_optimizer and saved is not None:
        for index in parts[0]["optimizer"]:
            values = saved["state"].setdefault(index, {})
            _fill(values, [part["optimizer"][index] for part in parts], entries, owned)


def _fill(
    target: dict[str, Any], parts: list[ByName], entries: Sequence[Mapping[str, Any]], owned: slice
) -> None:
    """Copy the experts with the global ids `owned` from the values of several files to `target`."""
    for name, first in parts[0].items():
        dtype = torch.float32 if first.dtype in HALVES else first.dtype
        target[name] = first.new_empty(owned.stop - owned.start, *first.shape[1:], dtype=dtype)
        for values, entry in zip(parts, entries, strict=True):
            start, stop = max(owned.start, entry["start"]), min(owned.stop, entry["stop"])
            target[name][start - owned.start : stop - owned.start] = values[name][
                start - entry["start"] : stop - entry["start"]
            ]


def read_expert_file(
    path: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Read one expert file of a checkpoint, and verify that it matches the manifest.

    Args:
        path: Path of the checkpoint.
        manifest: The checkpoint's manifest, already checked.
        entry: The file's entry in the manifest.

    Returns:
        The contents that `write_expert_file` wrote. Tensors are mapped from the file and are not
        yet in memory.

    Raises:
        ValueError: if the file is missing or damaged, or comes from another save. The message
            names it.
    """
    part = path.parent / entry["name"]
    experts = f"experts {entry['start']} to {entry['stop'] - 1} of `{path.name}`"
    way_out = "Copy it again from the training folder, or specify another checkpoint."
    if not part.is_file():
        raise ValueError(f"`{part}`, which contains {experts}, is missing. {way_out}")
    is_whole = part.stat().st_size == entry["bytes"] and compute_sha256(part) == entry["sha256"]
    try:
        content = read_file(part, is_header_only=True)
    except ValueError:
        content = None
    save_id = content.get("save_id") if isinstance(content, dict) else manifest["save_id"]
    if save_id != manifest["save_id"]:
        raise ValueError(
            f"`{part}` comes from the save {shown(save_id)}, but `{path.name}` from "
            f"{manifest['save_id']}, so the file cannot contain {experts}. {way_out}"
        )
    if not is_whole or content is None:
        raise ValueError(
            f"`{part}`, which contains {experts}, is damaged: its size or SHA-256 hash does "
            f"not match the entry in `{path.name}`. {way_out}"
        )
    return content


def _check_content(
    path: Path,
    state: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    parts: Sequence[Mapping[str, Any]],
) -> None:
    """Check that the files contain the parameters and optimizer states that the checkpoint lacks.

    Raises:
        ValueError: if any are missing. The message names the file and the difference.
    """
    names = expert_names(path, state)
    optimizer = state.get("last_optimizer_state")
    states = optimizer.get("state") if isinstance(optimizer, dict) else {}
    if not isinstance(states, dict):
        raise ValueError(
            f"`{path}` has the optimizer state {shown(states)}, which is not a dictionary. "
            f"{COPY_AGAIN}"
        )
    dtypes = {value.dtype for value in state["model"].values()}
    dtypes |= HALVES if _is_in_half_precision(state) else set()
    for entry, part in zip(entries, parts, strict=True):
        try:
            _check_part(part, entry, parts[0], names)
            for name, value in part["model"].items():
                if name in state["model"]:
                    raise ValueError(f"it has {shown(name)}, which is also in the checkpoint")
                if value.dtype not in dtypes:
                    raise ValueError(f"{shown(name)} is {value.dtype}, unlike all other parameters")
            for index, values in part["optimizer"].items():
                repeated = values.keys() & (states.get(index) or {}).keys()
                if repeated:
                    raise ValueError(
                        f"it has the state {shown(repeated)} of parameter {index}, which is also "
                        "in the checkpoint"
                    )
        except ValueError as error:
            raise ValueError(
                f"`{path.parent / entry['name']}` does not contain the experts missing from "
                f"`{path.name}`: {error}. {COPY_AGAIN}"
            ) from None
        for key in ("model", "optimizer"):
            check_finite_values(path.parent / entry["name"], part[key], key)


def _is_in_half_precision(state: Mapping[str, Any]) -> bool:
    cfg = state.get("cfg")
    common = cfg.get("common") if isinstance(cfg, Mapping) else None
    return isinstance(common, Mapping) and any(common.get(name) for name in PRECISIONS)


def _check_part(
    part: Mapping[str, Any],
    entry: Mapping[str, Any],
    first: Mapping[str, Any],
    names: Mapping[int, str],
) -> None:
    """Check one file against its entry, the names in the checkpoint, and the first file."""
    for key in ("start", "stop"):
        if part.get(key) != entry[key]:
            raise ValueError(f"its {key} is {shown(part.get(key))}, not {entry[key]}")
    model: Any = part.get("model")
    optimizer: Any = part.get("optimizer")
    count = entry["stop"] - entry["start"]
    _check_tensors(model, count)
    expected = set(names.values()) or first["model"].keys()
    if not model or model.keys() != expected:
        raise ValueError(f"it has the parameters {shown(sorted(model))}, not {shown(expected)}")
    if not isinstance(optimizer, dict) or not optimizer.keys() <= (names or optimizer).keys():
        raise ValueError(f"its optimizer state is invalid: {shown(optimizer)}")
    for index, values in optimizer.items():
        if not isinstance(index, int):
            raise ValueError(f"its optimizer state has the invalid index {shown(index)}")
        _check_tensors(values, count)
    if _layout(part) != _layout(first):
        raise ValueError("its shapes, dtypes or names differ from those of the first file")


def _check_tensors(values: Any, count: int) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"it has {shown(values)} instead of tensors")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.dim() == 0:
            raise ValueError(f"{shown(name)} is not a tensor")
        if len(value) != count or value.numel() == 0:
            raise ValueError(
                f"{shown(name)} has the shape {tuple(value.shape)}, which does not match {count} "
                "experts"
            )


def _layout(part: Mapping[str, Any]) -> Any:
    """Return the name, shape (for one expert) and dtype of every tensor in a file."""
    return [
        {name: (value.shape[1:], value.dtype) for name, value in values.items()}
        for values in (part["model"], *(v for _, v in sorted(part["optimizer"].items())))
    ], sorted(part["optimizer"])


def rows_of(values: Mapping[str, Any], count: int) -> ByName:
    """Return an optimizer state's tensors whose first dimension is `count`, one per expert."""
    return {
        name: value
        for name, value in sorted(values.items())
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
    }


def remove_unused_files(folder: Path) -> None:
    """Delete expert files that no checkpoint in the folder refers to."""
    found = set(folder.glob(f"{PREFIX}*.pt"))
    for path in folder.glob(f"{PREFIX}*.pt.tmp"):
        path.unlink()
    if not found:
        return
    used: set[str] = set()
    for path in sorted(set(folder.glob("*.pt")) - found):
        used |= _files_used_by(path, {file.name for file in found})
    for path in found:
        if path.name not in used:
            path.unlink()


def _files_used_by(path: Path, names: set[str]) -> set[str]:
    """Return those of the files `names` that a checkpoint refers to.

    If the checkpoint is damaged, its bytes are searched for the names. If it cannot be opened, all
    names are returned.
    """
    try:
        state = read_file(path, is_header_only=True)
        manifest = state.get(MANIFEST) if isinstance(state, dict) else None
        if manifest is None:
            return set()
        return {entry["name"] for entry in manifest["files"]}
    except OSError:
        return names
    except (ValueError, TypeError, KeyError, AttributeError):
        content = path.read_bytes()
        return {name for name in names if name.encode() in content}
