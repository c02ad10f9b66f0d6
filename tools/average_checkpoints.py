#!/usr/bin/env python3
"""Average the parameters of several checkpoints of one training run into a new checkpoint.

    average_checkpoints.py --output average.pt checkpoint8.pt checkpoint9.pt checkpoint10.pt
    average_checkpoints.py --output average.pt --folder checkpoints --last 5
    average_checkpoints.py --output average.pt --folder checkpoints --best 5

The result translates, but training cannot go on from it: it has no optimizer state. Checkpoints
are read with torch's safe loader, which runs no code from the file.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmt_moe.checkpoints.expert_files import read_checkpoint, restore_experts

BY_AGE = [re.compile(r"checkpoint_\d+_(\d+)\.pt"), re.compile(r"checkpoint(\d+)\.pt")]
# fairseq: the metric's name, its value with three digits, and a random digit for equal values.
BY_SCORE = re.compile(r"checkpoint\.best_\w+?_(-?\d+\.\d+)\.pt")


def find_last(folder: Path, count: int) -> list[Path]:
    """Find the `count` newest checkpoints, by updates where names have them, else by epoch."""
    for pattern in BY_AGE:
        found = _sorted_matches(folder, pattern)
        if found:
            return _take(found[-count:], folder, count)
    return _take([], folder, count)


def find_best(folder: Path, count: int, is_larger_better: bool = False) -> list[Path]:
    """Find the `count` best of those that fairseq's `--keep-best-checkpoints` left."""
    found = _sorted_matches(folder, BY_SCORE)
    return _take(found[-count:] if is_larger_better else found[:count], folder, count)


def _sorted_matches(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    matches = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((float(match[1]), path) for match, path in matches if match)]


def _take(found: list[Path], folder: Path, count: int) -> list[Path]:
    if len(found) < count:
        raise ValueError(
            f"{folder} has {len(found)} checkpoints of that kind, but {count} were asked for"
        )
    return found


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with experts that stand in files beside it, without their optimizer.

    Raises:
        ValueError: the file, or one of experts, is missing, damaged, or no fairseq checkpoint.
    """
    state = read_checkpoint(path)
    restore_experts(path, state, with_optimizer=False)
    return state


def average_parameters(paths: list[Path]) -> dict[str, Tensor]:
    """Average each parameter over the checkpoints, in float64; integers are those of the last.

    Raises:
        ValueError: two checkpoints differ in the names or shapes of their parameters.
    """
    sums: dict[str, Tensor] = {}
    parameters: dict[str, Tensor] = {}
    for path in paths:
        parameters = load(path)["model"]
        shapes = {name: value.shape for name, value in parameters.items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise ValueError(
                f"{path}: its parameters have other names or shapes than those of {paths[0]}"
            )
        for name, value in parameters.items():
            if not value.is_floating_point():
                sums[name] = value
            else:
                sums[name] = sums[name] + value.double() if name in sums else value.double()
    return {
        name: (sums[name] / len(paths)).to(value.dtype) if value.is_floating_point() else value
        for name, value in parameters.items()
    }


def average_checkpoints(paths: list[Path], output: Path) -> None:
    """Write the averaged checkpoint; the rest is that of the last, less the optimizer's state."""
    averaged = average_parameters(paths)
    state = load(paths[-1])
    state["model"] = averaged
    state.pop("last_optimizer_state", None)
    # Written beside and renamed, so that a broken-off run leaves no half file.
    partial = output.with_name(output.name + ".part")
    torch.save(state, partial)
    os.replace(partial, output)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help="the files to average")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--folder", type=Path, help="choose the files from this folder")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--last", type=int, metavar="N", help="the N newest, by update or epoch")
    choice.add_argument(
        "--best", type=int, metavar="N", help="the N best that --keep-best-checkpoints left"
    )
    parser.add_argument(
        "--larger-is-better",
        action="store_true",
        help="for --best: the metric is a score, not a loss",
    )
    return parser


def choose(arguments: argparse.Namespace) -> list[Path]:
    """Return the checkpoints that the command line names."""
    if arguments.folder is None:
        if not arguments.checkpoints or arguments.last or arguments.best:
            raise ValueError("name either checkpoints, or `--folder` with `--last` or `--best`")
        return arguments.checkpoints
    count = arguments.last if arguments.last is not None else arguments.best
    if arguments.checkpoints or count is None or count < 1:
        raise ValueError(
            "`--folder` needs `--last` or `--best` of at least 1, and no further checkpoints"
        )
    if not arguments.folder.is_dir():
        raise ValueError(f"{arguments.folder}: no such folder")
    if arguments.last is not None:
        return find_last(arguments.folder, count)
    return find_best(arguments.folder, count, arguments.larger_is_better)


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        paths = choose(arguments)
        average_checkpoints(paths, arguments.output)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{arguments.output}: average of {', '.join(path.name for path in paths)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
