"""Files of experts beside a checkpoint: each holds a range of them, and their optimizer's state.

A checkpoint `checkpoint_last.pt` without its experts has a manifest under the key `expert_files`:

    {"save_id": "1f0c...", "num_experts": 8, "files": [
        {"name": "experts-1f0c...-0-4.pt", "start": 0, "stop": 4, "bytes": 81920, "sha256": "..."},
        {"name": "experts-1f0c...-4-8.pt", "start": 4, "stop": 8, ...}]}

Names are never used twice, and the checkpoint is written last. So its copies share the files, and
until it is whole the checkpoint before it has all of its own.
"""

import argparse
import hashlib
import os
import pickle
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmt_moe.checks import check_divides, check_range
from nmt_moe.parallel import (
    ExpertParallelGroup,
    from_first_rank,
    gather_from_ranks,
    is_first_replica,
)

MANIFEST = "expert_files"
# Of an ordinary checkpoint, in its extra state: names of experts by their place in the optimizer.
PLACES = "expert_places"
PREFIX = "experts-"

ByName = dict[str, Tensor]
ByPlace = dict[int, ByName]


def save_experts(
    folder: Path, num_experts: int, model: ByName, optimizer: ByPlace, group: ExpertParallelGroup
) -> dict[str, Any] | None:
    """Write this rank's experts beside a checkpoint to come, unless a lower rank holds the same.

    All ranks must call. No rank needs memory for the experts of others.

    Args:
        folder: Of the checkpoint, the same for all ranks.
        num_experts: E.
        model: (L, ...) parameters by name.
        optimizer: (L, ...) state by the parameter's place in the optimizer, and name.
        group: The ranks that hold the others.

    Returns:
        The checkpoint's manifest; None on ranks whose experts another rank writes.

    Raises:
        FileNotFoundError: if the first rank does not see what another rank wrote.
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
                f"process {writer} wrote `{written['name']}`, but process 0 does not find it in "
                f"`{folder}`. The folder must be one that all machines share."
            )
    return make_manifest(save_id, entries)


def new_save_id() -> str:
    """Draw what names one save; not from torch's generator, which training owns."""
    return secrets.token_hex(8)


def write_expert_file(
    folder: Path, save_id: str, owned: slice, model: ByName, optimizer: ByPlace
) -> dict[str, Any]:
    """Write a range of experts, whole or not at all.

    Args:
        folder: Of the checkpoint.
        save_id: Of the checkpoint.
        owned: Global ids of the experts.
        model: (L, ...) parameters by name.
        optimizer: (L, ...) state by the parameter's place in the optimizer, and name.

    Returns:
        Its entry in the manifest.
    """
    path = folder / f"{PREFIX}{save_id}-{owned.start}-{owned.stop}.pt"
    header = {"save_id": save_id, "start": owned.start, "stop": owned.stop}
    write_whole(path, {**header, "model": model, "optimizer": optimizer})
    size, digest = path.stat().st_size, _sha256(path)
    return {"name": path.name, **header, "bytes": size, "sha256": digest}


def make_manifest(save_id: str, entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Put together what the files of all experts wrote of themselves."""
    files = sorted(entries, key=lambda entry: entry["start"])
    return {"save_id": save_id, "num_experts": files[-1]["stop"], "files": files}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as it is, its experts aside, without running code from it.

    Raises:
        ValueError: if the file is missing, damaged, or no checkpoint of fairseq.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with _allowing_settings():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path}: has no `model`, so it is not a checkpoint of fairseq")
    return state


def restore_experts(
    path: Path, state: dict[str, Any], owned: slice | None = None, with_optimizer: bool = True
) -> None:
    """Put experts from their files back into a checkpoint that was read.

    Args:
        path: Of the checkpoint; the files stand beside it.
        state: What it holds. One that has its experts is left alone.
        owned: Global ids of those wanted; None for all. Only files with any of them are read.
        with_optimizer: Also their optimizer's state.

    Raises:
        ValueError: naming a file that is missing, damaged or of another save, or the experts
            that no file, or more than one, has.
    """
    manifest = state.pop(MANIFEST, None)
    if manifest is None:
        return
    check_manifest(path, manifest)
    owned = owned or slice(0, manifest["num_experts"])
    for entry in manifest["files"]:
        if entry["start"] >= owned.stop or entry["stop"] <= owned.start:
            continue
        part = read_expert_file(path, manifest, entry)
        taken = slice(max(owned.start, entry["start"]), min(owned.stop, entry["stop"]))
        _fill(state["model"], part["model"], entry, taken, owned)
        if with_optimizer and "last_optimizer_state" in state:
            saved = state["last_optimizer_state"]["state"]
            for place, values in part["optimizer"].items():
                _fill(saved.setdefault(place, {}), values, entry, taken, owned)


def _fill(
    target: ByName, values: ByName, entry: Mapping[str, Any], taken: slice, owned: slice
) -> None:
    """Copy the experts `taken` from a file's values into tensors of those `owned`."""
    for name, value in values.items():
        if name not in target:
            target[name] = value.new_empty(owned.stop - owned.start, *value.shape[1:])
        start, first = taken.start - owned.start, taken.start - entry["start"]
        count = taken.stop - taken.start
        target[name][start : start + count] = value[first : first + count]


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest whose files do not hold each expert once.

    Raises:
        ValueError: naming the checkpoint and the experts.
    """
    end = 0
    for entry in manifest["files"]:
        if entry["start"] != end:
            first, last = sorted((entry["start"], end))
            fault = "in no file" if entry["start"] > end else "in more than one file"
            raise ValueError(
                f"`{path}` has experts {first} to {last - 1} {fault}. Name another checkpoint."
            )
        end = entry["stop"]
    if end != manifest["num_experts"]:
        raise ValueError(f"`{path}` has experts from {end} on in no file. Name another checkpoint.")


def read_expert_file(
    path: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Read one file of a checkpoint's experts and verify that it is what the manifest says.

    Args:
        path: Of the checkpoint.
        manifest: Of the checkpoint.
        entry: Of the file, in the manifest.

    Returns:
        What `write_expert_file` was given; tensors are mapped from the file, not yet in memory.

    Raises:
        ValueError: naming the file, if it is missing, damaged or of another save.
    """
    part = path.parent / Path(entry["name"]).name  # never outside the folder
    experts = f"experts {entry['start']} to {entry['stop'] - 1} of `{path.name}`"
    way_out = "Copy it again from the training's folder, or name another checkpoint."
    if not part.is_file():
        raise ValueError(f"`{part}` is missing: it holds {experts}. {way_out}")
    is_whole = part.stat().st_size == entry["bytes"] and _sha256(part) == entry["sha256"]
    try:
        content = torch.load(part, map_location="cpu", weights_only=True, mmap=True)
        save_id = content["save_id"]
    except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError):
        is_whole, save_id = False, manifest["save_id"]
    if save_id != manifest["save_id"]:
        raise ValueError(
            f"`{part}` is of another save ({save_id}) than `{path.name}` "
            f"({manifest['save_id']}), and cannot be its {experts}. {way_out}"
        )
    if not is_whole:
        raise ValueError(
            f"`{part}` is damaged: its size or sha256 is not that in `{path.name}`. "
            f"It holds {experts}. {way_out}"
        )
    return content


def split_checkpoint(state: dict[str, Any], path: Path, num_files: int) -> None:
    """Write a checkpoint that has its experts as one with files of experts.

    Args:
        state: The checkpoint; changed.
        path: What to write; the files come beside it.
        num_files: Files; a divisor of the number of experts.

    Raises:
        ValueError: if it has no experts, does not say which parameters are experts, or their
            number is no multiple of `num_files`.
    """
    places: dict[int, str] | None = state.get("extra_state", {}).get(PLACES)
    if not places:
        raise ValueError(
            "the checkpoint does not say which of its parameters are experts: it has none, or was "
            "trained with --fp16's flat gradients or an older version. Train it one update further."
        )
    num_experts = len(state["model"][next(iter(places.values()))])
    check_range("--files", num_files, 1)
    check_divides("num_experts", num_experts, "`--files`", num_files)
    save_id, share = new_save_id(), num_experts // num_files
    model = {name: state["model"].pop(name) for name in places.values()}
    optimizer: ByPlace = {}
    states = state.get("last_optimizer_state", {}).get("state", {})
    for place in places:
        rows = rows_of(states.get(place, {}), num_experts)
        optimizer[place] = {name: states[place].pop(name) for name in rows}
    entries = []
    for start in range(0, num_experts, share):
        owned = slice(start, start + share)
        parts = {name: value[owned].clone() for name, value in model.items()}
        of_optimizer = {
            place: {name: value[owned].clone() for name, value in values.items()}
            for place, values in optimizer.items()
        }
        entries.append(write_expert_file(path.parent, save_id, owned, parts, of_optimizer))
    state[MANIFEST] = make_manifest(save_id, entries)
    write_whole(path, state)


def rows_of(values: Mapping[str, Any], count: int) -> ByName:
    """Return what of an optimizer's state has one row for each of `count` experts."""
    return {
        name: value
        for name, value in sorted(values.items())
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
    }


def remove_unused_files(folder: Path) -> None:
    """Delete files of experts that no checkpoint of the folder refers to.

    Raises:
        ValueError: naming a checkpoint that cannot be read; then none is deleted.
    """
    found = set(folder.glob(f"{PREFIX}*.pt"))
    if not found:
        return
    used: set[Path] = set()
    for path in sorted(set(folder.glob("*.pt")) - found):
        try:
            with _allowing_settings():
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"`{path}` cannot be read, so files of experts that it may need are kept: "
                f"{str(error).splitlines()[0]}"
            ) from error
        manifest = state.get(MANIFEST) if isinstance(state, dict) else None
        used.update(folder / entry["name"] for entry in (manifest or {"files": []})["files"])
    for path in found - used:
        path.unlink()
    for path in folder.glob(f"{PREFIX}*.pt.tmp"):
        path.unlink()


@contextmanager
def _allowing_settings() -> Iterator[None]:
    """Let torch's safe loader take an argparse.Namespace, as it does afterwards if it did before.

    It holds the settings of models without a dataclass, and is plain data. torch's own context
    would take the permission away that others gave.
    """
    is_allowed = argparse.Namespace in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([] if is_allowed else [argparse.Namespace]):
        yield


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint or a file of experts, whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.unlink(missing_ok=True)  # what a stopped save left, or a link to another file
    with unfinished.open("xb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # the name must not reach the disk before the content
    os.replace(unfinished, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
