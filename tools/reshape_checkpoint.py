#!/usr/bin/env python3
"""Verify, merge or split a checkpoint whose experts stand in files beside it.

    reshape_checkpoint.py verify checkpoints/checkpoint_best.pt
    reshape_checkpoint.py merge checkpoints/checkpoint_best.pt --output whole.pt
    reshape_checkpoint.py split whole.pt --files 8 --output parts/checkpoint_last.pt

Training on several processes (`--expert-parallel-size`) writes such files, and every command reads
them: this is for copying, and for machines with other amounts of memory. `verify` compares each
file with its size and sha256 in the checkpoint; `merge` writes one ordinary checkpoint; `split`
writes `--files` files of experts, from a checkpoint of either kind. Optimizer states go along.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nmt_moe.checkpoints.expert_files import (
    MANIFEST,
    check_manifest,
    read_checkpoint,
    read_expert_file,
    restore_experts,
    split_checkpoint,
    write_whole,
)


def verify(path: Path) -> str:
    """Read every file of a checkpoint.

    Returns:
        What it has.

    Raises:
        ValueError: naming the file that is missing, damaged or of another save.
    """
    manifest = read_checkpoint(path).get(MANIFEST)
    if manifest is None:
        return f"{path}: whole, without files of experts"
    check_manifest(path, manifest)
    for entry in manifest["files"]:
        read_expert_file(path, manifest, entry)
    size = sum(entry["bytes"] for entry in manifest["files"]) / 1e6
    count = len(manifest["files"])
    return f"{path}: {manifest['num_experts']} experts in {count} files ({size:.1f} MB), all whole"


def merge(path: Path, output: Path) -> str:
    """Write one ordinary checkpoint."""
    state = read_checkpoint(path)
    restore_experts(path, state)
    write_whole(output, state)
    return f"{output}: {path} in one file"


def split(path: Path, output: Path, num_files: int) -> str:
    """Write a checkpoint with its experts in `num_files` files."""
    state = read_checkpoint(path)
    restore_experts(path, state)
    output.parent.mkdir(parents=True, exist_ok=True)
    split_checkpoint(state, output, num_files)
    return f"{output}: {path} with its experts in {num_files} files"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("verify", "merge", "split"):
        command = commands.add_parser(name)
        command.add_argument("checkpoint", type=Path)
        if name != "verify":
            command.add_argument("--output", type=Path, required=True, help="checkpoint to write")
        if name == "split":
            command.add_argument("--files", type=int, required=True, help="files of experts")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        if arguments.command == "verify":
            done = verify(arguments.checkpoint)
        elif arguments.command == "merge":
            done = merge(arguments.checkpoint, arguments.output)
        else:
            done = split(arguments.checkpoint, arguments.output, arguments.files)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{done}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
