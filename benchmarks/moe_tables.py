"""Lay out moe_layer.py's measurements as tables."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks import timing
from benchmarks.moe_points import BARE, MODES, Point

# A round is disturbed if its threads waited for a core for more than this share of the time.
MOST_WAITED = 0.05
# With fewer undisturbed rounds than this, the median is taken over all rounds and marked.
LEAST_CLEAN = 3
MARK = "~"
# Times are divided by the times of these competitors, for each kind of point.
YARDSTICKS = {"layer": ("bmm", "gemm"), "gating": ("copy", "eager_gating")}


@dataclass(frozen=True)
class Timing:
    """The times of one competitor in one mode.

    Attributes:
        samples: Seconds of the rounds that count.
        is_clean: Whether there were enough undisturbed rounds to count only those.
    """

    samples: timing.Samples
    is_clean: bool


def summarise(rounds: list[list[dict[str, Any]]], threads: int) -> Timing:
    """Reduce each round to one number, and keep only the undisturbed rounds if there are enough.

    A round's number is the median of its undisturbed samples, or of all samples if there are none.
    """
    every, clean = timing.Samples(), timing.Samples()
    for samples in rounds:
        calm = [
            sample
            for sample in samples
            if sample["waited"] <= MOST_WAITED * sample["seconds"] * threads
        ]
        for target in [every, clean] if calm else [every]:
            chosen = calm or samples
            target.seconds.append(statistics.median(sample["seconds"] for sample in chosen))
            for part in chosen[0]["parts"]:
                values = [sample["parts"][part] for sample in chosen]
                target.parts.setdefault(part, []).append(statistics.median(values))
    is_clean = len(clean.seconds) >= LEAST_CLEAN
    return Timing(clean if is_clean else every, is_clean)


def summarise_point(found: dict[str, Any], threads: int) -> dict[str, dict[str, Timing]]:
    """Return the timings by label and mode, without competitors that were abandoned."""
    return {
        one["label"]: {mode: summarise(rounds, threads) for mode, rounds in one["rounds"].items()}
        for one in found["competitors"]
        if one["skipped"] is None
    }


def format_point(found: dict[str, Any], threads: int) -> str:
    """Lay out the table of one point under a heading, and list abandoned modes below it."""
    point = Point.from_json(found["point"])
    times = summarise_point(found, threads)
    modes = [mode for mode in MODES if mode in point.modes]
    ratios = [(mode, name) for mode in modes if mode in BARE for name in YARDSTICKS[point.kind]]
    columns = [point.kind, "k", *(f"{mode} ms" for mode in modes)]
    columns += ["optimizer ms"] if "step" in modes else []
    columns += [*(f"{mode} / {name}" for mode, name in ratios), "spread"]
    columns += [*(f"{mode} MB" for mode in modes), "dropped"]
    lines = []
    for one in found["competitors"]:
        if one["skipped"] is not None:
            continue
        mine = times[one["label"]]
        line = [one["label"], str(one["top_k"]), *(_milliseconds(mine.get(mode)) for mode in modes)]
        line += [_milliseconds(mine.get("step"), "optimizer")] if "step" in modes else []
        line += [_ratio(times, one, mode, name, point) for mode, name in ratios]
        # Show the spread of the mode with the most work.
        line.append(f"{mine[[mode for mode in modes if mode in mine][-1]].samples.spread:.0%}")
        peaks = [one["peaks"].get(mode) for mode in modes]
        line += ["-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks]
        dropped = one["facts"].get("dropped")
        lines.append([*line, "-" if dropped is None else f"{dropped:.1%}"])
    heading = f"### {point}: {point.rows_per_expert:.3g} rows per expert"
    return "\n\n".join([heading, timing.markdown_table(columns, lines), *_given_up(found)])


def _milliseconds(timed: Timing | None, part: str | None = None) -> str:
    if timed is None:
        return "-"
    seconds = timed.samples.part(part) if part else timed.samples.median
    digits = max(0, 2 - math.floor(math.log10(seconds * 1e3))) if seconds > 0 else 0
    return f"{seconds * 1e3:.{min(digits, 4)}f}{'' if timed.is_clean else MARK}"


def _ratio(
    times: dict[str, dict[str, Timing]], one: dict[str, Any], mode: str, name: str, point: Point
) -> str:
    """Return a competitor's time over the yardstick's for the same number of experts per token."""
    label = name if one["top_k"] == point.top_k else f"{name} k={one['top_k']}"
    mine, limit = times[one["label"]].get(mode), times.get(label, {}).get(mode)
    if mine is None or limit is None:
        return "-"
    return f"{mine.samples.median / limit.samples.median:.2f}"


def _given_up(found: dict[str, Any]) -> list[str]:
    lines = []
    for one in found["competitors"]:
        if one["skipped"] is not None:
            lines.append(f"No figures for {one['label']}: {one['skipped']}.")
        for mode, reason in one["failed"].items():
            lines.append(f"{mode} of {one['label']} was abandoned: {reason}.")
    return lines


def format_notes(points: list[dict[str, Any]]) -> str:
    """List the notes and the optimizer of each competitor."""
    notes: dict[str, str] = {}
    for found in points:
        for one in found["competitors"]:
            words = [one["facts"].get("notes"), one["facts"].get("optimizer")]
            text = "; ".join(word for word in words if word)
            if text and len(text) > len(notes.get(one["name"], "")):
                notes[one["name"]] = text
    return "\n".join(f"- {name}: {text}." for name, text in notes.items())


def format_all(document: dict[str, Any]) -> str:
    """Lay out everything that a JSON file contains."""
    threads, points = document["settings"]["threads"], document["rows"]
    tables = "\n\n".join(format_point(found, threads) for found in points)
    legend = (
        f"{document['hardware']}; medians of {document['settings']['rounds']} interleaved rounds. "
        "MB: peak memory of the competitor's process minus its memory at the start, in this mode "
        "and the modes to the left. "
        "k: experts per token; a layer with fewer is compared with the limits for the same k. "
        f"{MARK}: fewer than {LEAST_CLEAN} rounds in which threads waited for a core for at "
        f"most {MOST_WAITED:.0%} of the time. dropped: share of (token, expert) pairs not computed."
    )
    return f"{tables}\n\n{legend}\n\n{format_notes(points)}"
