"""Read fairseq's logs of training, validation, generation and evaluation."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("train", "valid", "test")
TRAINING = ("train_inner", "train")  # within an epoch and at its end


@dataclass
class Run:
    """The log entries of one training run.

    Attributes:
        label: Name of the run in a legend.
        columns: For each column, such as `valid.ppl`, the value at each number of updates.
    """

    label: str
    columns: dict[str, dict[int, float]] = field(default_factory=dict)

    def curve(self, names: Sequence[str]) -> tuple[list[int], list[float]]:
        """Return the points of the first of `names` that was logged, in order of updates."""
        points = next((self.columns[name] for name in names if name in self.columns), {})
        updates = sorted(points)
        return updates, [points[update] for update in updates]

    @property
    def is_estimated(self) -> bool:
        """Return whether the training loss is estimated from a sample of the classes."""
        return any(f"{split}.sampled_softmax" in self.columns for split in TRAINING)


@dataclass(frozen=True)
class Loss:
    """The result of fairseq-eval-lm.

    Attributes:
        bits: Loss per token.
        tokens: Number of tokens scored, including end marks.
    """

    bits: float
    tokens: int


def read_runs(names: Sequence[str]) -> list[Run]:
    """Read the training logs that `names` lists as FILE or LABEL=FILE.

    Raises:
        ValueError: if a file is not a log.
        OSError: if a file cannot be opened.
    """
    given = []
    for name in names:
        label, path = "", name
        if not Path(name).exists():
            label, _, path = name.rpartition("=")
        given.append((label, Path(path)))
    unnamed = name_files([file for label, file in given if not label])
    return [read_file(label or unnamed[file], file) for label, file in given]


def name_files(files: Sequence[Path]) -> dict[Path, str]:
    """Name files by their stems, or by the shortest path suffixes that differ."""
    names = {file: file.stem for file in files}
    parts = {file: Path(os.path.abspath(file)).parts for file in files}
    for file, own in parts.items():
        # Two spellings of one path have no suffixes that differ.
        others = [o for path, o in parts.items() if path.stem == file.stem and o != own]
        if others:
            end = 1
            while any(other[-end:] == own[-end:] for other in others):
                end += 1
            names[file] = str(Path(*own[-end:]))
    return names


def read_file(label: str, file: Path) -> Run:
    """Read one log.

    Raises:
        ValueError: if it is not a log.
        OSError: if it cannot be opened.
    """
    with file.open(encoding="utf-8", errors="replace") as lines:
        run = read_run(label, lines)
    if not run.columns:
        raise ValueError(
            f"`{file}` contains no entry from fairseq's `--log-format json`. Train with this "
            "option, or name another file."
        )
    return run


def read_run(label: str, lines: Iterable[str]) -> Run:
    """Collect the entries of a training log. If an update occurs twice, the later entry counts."""
    run = Run(label)
    for entry in read_entries(lines):
        split = split_of(entry)
        prefix = "" if split == "train_inner" else f"{split}_"
        update = as_number(entry.get(f"{prefix}num_updates"))
        if update is None:
            continue
        for key, value in entry.items():
            number = as_number(value)
            if key.startswith(prefix) and number is not None:
                points = run.columns.setdefault(f"{split}.{key[len(prefix) :]}", {})
                points[int(update)] = number
    return run


def read_entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects at the ends of lines, as `--log-format json` writes them."""
    for line in lines:
        try:
            entry = json.loads(line[line.index('{"') :])
        except (ValueError, RecursionError):  # no brace, or not JSON after it
            continue
        if isinstance(entry, dict):
            yield entry


def split_of(entry: dict[str, Any]) -> str:
    """Return the split of an entry: train_inner within an epoch, else one of SPLITS."""
    return next((name for name in SPLITS if f"{name}_num_updates" in entry), "train_inner")


def as_number(value: Any) -> float | None:
    """Parse a number, which fairseq writes as text; return None if it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def format_progress(entry: dict[str, Any]) -> str | None:
    """Return a short line for an entry within an epoch or of a validation, or None for others."""
    split = split_of(entry)
    if split not in ("train_inner", "valid"):
        return None
    prefix = "" if split == "train_inner" else "valid_"
    keys = ("num_updates", "ppl", *(("wps", "moe_cv_load") if not prefix else ()))
    found = [f"  {key} {entry[prefix + key]}" for key in keys if prefix + key in entry]
    if f"{prefix}num_updates" not in entry:
        return None
    return f"{'valid:' if prefix else '':6}{''.join(found)}"


def read_loss(lines: Iterable[str]) -> Loss:
    """Return the last loss in fairseq-eval-lm's output.

    The loss is read because the perplexity has only two decimals.

    Raises:
        ValueError: if there is no loss.
    """
    bits = tokens = None
    for line in lines:
        if found := re.search(r"Evaluated ([\d,]+) tokens", line):
            bits, tokens = None, int(found[1].replace(",", ""))
        if found := re.search(r"Loss \(base 2\): ([^\s,]+)", line):
            bits = as_number(found[1])
    if bits is None or tokens is None:
        raise ValueError("has no loss from fairseq-eval-lm: the evaluation did not finish")
    return Loss(bits, tokens)


def read_hypotheses(lines: Iterable[str]) -> list[str]:
    """Return the best translation of each sentence in fairseq-generate's output, in text order.

    Raises:
        ValueError: if there are no translations, a sentence is missing, or there are several runs.
    """
    best: dict[int, str] = {}
    previous = None
    for line in lines:
        if found := re.match(r"D-(\d+)\t[^\t]*\t(.*)", line, re.DOTALL):
            number = int(found[1])
            if number in best and number != previous:  # the lines of an n-best list are consecutive
                raise ValueError(f"sentence {number} is translated twice: are these several runs?")
            best.setdefault(number, found[2])
            previous = number
    if not best:
        raise ValueError("there are no D- lines: is this the output of fairseq-generate?")
    missing = next((number for number in range(max(best)) if number not in best), None)
    if missing is not None:
        raise ValueError(
            f"sentence {missing} has no translation, but sentence {max(best)} has one. "
            "Translate again; `--required-batch-size-multiple 1` keeps the last batch."
        )
    return [best[number] for number in sorted(best)]
