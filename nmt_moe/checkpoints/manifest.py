"""The manifest of a checkpoint that keeps its experts in files beside it.

If a checkpoint does not contain its experts, it has a manifest under the key `expert_files`:

    {"save_id": "1f0c...", "num_experts": 8, "files": [
        {"name": "experts-1f0c...-0-4.pt", "save_id": "1f0c...", "start": 0, "stop": 4,
         "bytes": 81920, "sha256": "..."},
        {"name": "experts-1f0c...-4-8.pt", "start": 4, "stop": 8, ...}]}

The names of expert files are never reused, and a checkpoint is written after its files. Copies of a
checkpoint therefore share the same expert files, and the previous checkpoint keeps all its expert
files until the new one is complete.
"""

import argparse
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nmt_moe.checkpoints.files import COPY_AGAIN, shown

MANIFEST = "expert_files"
# Key in a checkpoint's extra state. Its value maps indices in the optimizer state to the names of
# the experts' parameters.
EXPERT_NAMES = "expert_places"
PREFIX = "experts-"
SAVE_ID = re.compile(r"[0-9a-zA-Z]{1,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_EXPERTS = 2**20


def new_save_id() -> str:
    """Return a random id for one save, without changing the state of torch's generator."""
    return secrets.token_hex(8)


def expert_file_name(save_id: str, owned: slice) -> str:
    """Return the file name for the experts with the global ids `owned`, given the save's id."""
    return f"{PREFIX}{save_id}-{owned.start}-{owned.stop}.pt"


def make_manifest(save_id: str, entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Combine the entries that `write_expert_file` returned for all files into a manifest."""
    files = sorted(entries, key=lambda entry: entry["start"])
    return {"save_id": save_id, "num_experts": files[-1]["stop"], "files": files}


def check_manifest(path: Path, state: Mapping[str, Any]) -> None:
    """Reject a manifest that is malformed or does not list each expert exactly once.

    Args:
        path: Path of the checkpoint.
        state: Contents of the checkpoint, with a manifest.

    Raises:
        ValueError: if the manifest is rejected. The message names the checkpoint and the fault.
    """
    manifest = state[MANIFEST]
    try:
        _check_fields(manifest)
        _check_coverage(manifest)
        _check_configuration(manifest["num_experts"], state)
    except ValueError as error:
        raise ValueError(f"`{path}` {error}. {COPY_AGAIN}") from None


def _check_fields(manifest: Any) -> None:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise ValueError(f"has a malformed manifest of experts: {shown(manifest)}")
    save_id: Any = manifest.get("save_id")
    num_experts: Any = manifest.get("num_experts")
    if not _is_text(save_id, SAVE_ID):
        raise ValueError(f"has a manifest of experts with an invalid save id: {shown(save_id)}")
    if not _is_count(num_experts) or not 0 < num_experts <= MAX_EXPERTS:
        raise ValueError(f"has a manifest for an invalid number of experts: {shown(num_experts)}")
    if len(manifest["files"]) > num_experts:
        count = len(manifest["files"])
        raise ValueError(f"has more expert files ({count}) than experts ({num_experts})")
    for entry in manifest["files"]:
        if not isinstance(entry, dict) or not all(
            _is_count(entry.get(key)) for key in ("start", "stop", "bytes")
        ):
            raise ValueError(f"has a malformed entry in its manifest of experts: {shown(entry)}")
        owned = slice(entry["start"], entry["stop"])
        if entry.get("name") != expert_file_name(save_id, owned) or owned.start >= owned.stop:
            name = shown(entry.get("name"))
            raise ValueError(f"lists an expert file with the wrong name: {name}")
        if not _is_text(entry.get("sha256"), SHA256):
            raise ValueError(f"lists an invalid SHA-256 hash: {shown(entry.get('sha256'))}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_text(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _check_coverage(manifest: Mapping[str, Any]) -> None:
    end = 0
    for entry in manifest["files"]:
        if entry["start"] != end:
            first, last = sorted((entry["start"], end))
            fault = "no file" if entry["start"] > end else "more than one file"
            raise ValueError(f"has {fault} for experts {first} to {last - 1}")
        end = entry["stop"]
    if end < manifest["num_experts"]:
        raise ValueError(f"has no file for experts {end} and higher")
    if end > manifest["num_experts"]:
        raise ValueError(f"has files for {end} experts instead of {manifest['num_experts']}")


def _check_configuration(num_experts: int, state: Mapping[str, Any]) -> None:
    configuration = state.get("cfg")
    model = configuration.get("model") if isinstance(configuration, dict) else None
    settings = vars(model) if isinstance(model, argparse.Namespace) else model
    expected = settings.get("num_experts") if isinstance(settings, dict) else None
    if expected is not None and expected != num_experts:
        raise ValueError(
            f"has files for {num_experts} experts, but its configuration says {shown(expected)}"
        )


def expert_names(path: Path, state: Mapping[str, Any]) -> dict[int, str]:
    """Map indices in the optimizer state to the names of the experts' parameters.

    Args:
        path: Path of the checkpoint, for error messages.
        state: Contents of the checkpoint.

    Returns:
        The names. The dictionary is empty if the checkpoint has no experts, or was written by an
        older version that did not store their names.

    Raises:
        ValueError: if the names are malformed. The message names the checkpoint.
    """
    extra = state.get("extra_state")
    names = extra.get(EXPERT_NAMES) if isinstance(extra, dict) else None
    if names is None:
        return {}
    if not isinstance(names, dict) or not all(
        _is_count(index) and isinstance(name, str) for index, name in names.items()
    ):
        raise ValueError(f"`{path}` has malformed parameter names: {shown(names)}. {COPY_AGAIN}")
    return names
