"""Average the parameters of several checkpoints."""

import re
from pathlib import Path

import torch
from torch import Tensor

from nmt_moe.checkpoints.files import check_output, write_whole
from nmt_moe.checkpoints.reader import count_updates, load_checkpoint

BY_EPOCH = re.compile(r"checkpoint(\d+)\.pt")
BY_UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")
# fairseq names its best checkpoints after the metric and its value with three decimals, followed by
# a random digit to break ties.
BY_SCORE = re.compile(r"checkpoint\.best_.+?_(-?\d+\.\d+)\.pt")


def find_numbered(
    folder: Path, pattern: re.Pattern[str], count: int, upper_bound: int | None = None
) -> list[Path]:
    """Find the `count` newest checkpoints with numbered names, oldest first.

    Args:
        folder: Folder of the checkpoints.
        pattern: Pattern of the file names, `BY_EPOCH` or `BY_UPDATE`.
        count: Number of checkpoints to find.
        upper_bound: Largest epoch or update to include; None for no bound.

    Raises:
        ValueError: if the folder does not exist or contains fewer than `count` such checkpoints.
    """
    found = _numbered(folder, pattern)
    return _take([p for n, p in found if upper_bound is None or n <= upper_bound], folder, count)


def find_last(folder: Path, count: int, upper_bound: int | None = None) -> list[Path]:
    """Find the `count` newest checkpoints, whether saved after epochs or updates, oldest first.

    A checkpoint is newer than another if it was saved after more updates.

    Args:
        folder: Folder of the checkpoints.
        count: Number of checkpoints to find.
        upper_bound: Largest number of updates to include; None for no bound.

    Raises:
        ValueError: if the folder does not exist or contains fewer than `count` such checkpoints.
    """
    by_updates = {count_updates(path): path for _, path in _numbered(folder, BY_EPOCH)}
    by_updates |= {int(updates): path for updates, path in _numbered(folder, BY_UPDATE)}
    found = [by_updates[n] for n in sorted(by_updates) if upper_bound is None or n <= upper_bound]
    return _take(found, folder, count)


def find_best(folder: Path, count: int) -> list[Path]:
    """Find the `count` best checkpoints that `--keep-best-checkpoints` kept, best last.

    The checkpoints' configuration says whether a larger metric is better.

    Raises:
        ValueError: if the folder does not exist or contains fewer than `count` such checkpoints.
    """
    found = [path for _, path in _numbered(folder, BY_SCORE)]
    if found and not _is_larger_better(found[0]):
        found.reverse()
    return _take(found, folder, count)


def _is_larger_better(path: Path) -> bool:
    settings = (load_checkpoint(path, with_optimizer=False).get("cfg") or {}).get("checkpoint")
    return bool((settings or {}).get("maximize_best_checkpoint_metric"))


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[float, Path]]:
    if not folder.is_dir():
        raise ValueError(f"`{folder}` does not exist or is not a folder")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((float(match[1]), path) for match, path in matches if match)


def _take(found: list[Path], folder: Path, count: int) -> list[Path]:
    if len(found) < count:
        raise ValueError(
            f"`{folder}` must contain {count} or more checkpoints of the chosen kind, but "
            f"contains {len(found)}. Average fewer, choose another kind, or name another folder."
        )
    return found[-count:]


def average_parameters(paths: list[Path]) -> dict[str, Tensor]:
    """Average each parameter over the checkpoints, computing in float64.

    Integers cannot be averaged, so they are taken from the last checkpoint.

    Raises:
        ValueError: if two checkpoints differ in the names, shapes or dtypes of their parameters.
    """
    sums: dict[str, Tensor] = {}
    layout: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for path in paths:
        parameters = load_checkpoint(path, with_optimizer=False)["model"]
        found = {name: (value.shape, value.dtype) for name, value in parameters.items()}
        layout = layout or found
        if found != layout:
            raise ValueError(
                f"the parameters of `{path}` and `{paths[0]}` differ in names, shapes or dtypes"
            )
        for name, value in parameters.items():
            if value.is_floating_point() and name in sums:
                sums[name] += value  # in float64
            else:
                sums[name] = value.double() if value.is_floating_point() else value
    return {
        name: (value / len(paths)).to(layout[name][1]) if value.is_floating_point() else value
        for name, value in sums.items()
    }


def average_checkpoints(paths: list[Path], output: Path, is_overwritten: bool = False) -> None:
    """Write a checkpoint with averaged parameters.

    Everything else is taken from the last checkpoint, except the optimizer state, which is left
    out. The result can translate, but training cannot resume from it.

    Args:
        paths: The checkpoints to average.
        output: The checkpoint to write.
        is_overwritten: Whether to replace an existing output.

    Raises:
        ValueError: if a checkpoint cannot be read, the checkpoints' parameters differ, or the
            output already exists.
    """
    check_output(output, is_overwritten)
    averaged = average_parameters(paths)
    state = load_checkpoint(paths[-1], with_optimizer=False)
    state["model"] = averaged
    state.pop("last_optimizer_state", None)
    write_whole(output, state)
