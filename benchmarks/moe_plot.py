"""Plot the time of a step against the number of experts, with all other sizes equal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.moe_points import Point
from benchmarks.moe_tables import Timing, summarise_point

# Parts are stacked; the other times are drawn as lines.
PARTS = ("gate and losses", "experts and dispatch", "optimizer")
LINES = {"bare products of the experts": "k--", "the step with torch's Adam": "k:"}


@dataclass(frozen=True)
class Steps:
    """The times of nmt_moe's steps at one size.

    Attributes:
        point: The size, apart from the number of experts.
        experts: The numbers of experts, ascending.
        seconds: For each of `PARTS` and `LINES`, one time for each of `experts`; NaN if it was not
            measured.
    """

    point: Point
    experts: list[int]
    seconds: dict[str, list[float]]


def parts_of_steps(document: dict[str, Any]) -> Steps:
    """Find the size measured with the most different numbers of experts, and split its steps.

    Raises:
        ValueError: if no size was measured with two numbers of experts.
    """
    threads = document["settings"]["threads"]
    by_size: dict[tuple[int, ...], dict[int, tuple[Point, dict[str, dict[str, Timing]]]]] = {}
    for found in document["rows"]:
        point = Point.from_json(found["point"])
        times = summarise_point(found, threads)
        if {"gate", "step"} <= times.get("nmt_moe", {}).keys():
            size = point.tokens, point.model_dim, point.hidden_dim, point.top_k
            by_size.setdefault(size, {})[point.num_experts] = point, times
    steps = max(by_size.values(), key=len, default={})
    if len(steps) < 2:
        raise ValueError(
            "--plot needs two or more numbers of experts at one size, timed in the modes "
            f'"gate" and "step", but found {len(steps)}. Use --grid scaling.'
        )
    experts = sorted(steps)
    columns = [_parts(steps[count][1]) for count in experts]
    names = (*PARTS, *LINES)
    seconds = {name: [column[name] for column in columns] for name in names}
    return Steps(steps[experts[0]][0], experts, seconds)


def _parts(times: dict[str, dict[str, Timing]]) -> dict[str, float]:
    def median(label: str, mode: str) -> float:
        timed = times.get(label, {}).get(mode)
        return float("nan") if timed is None else timed.samples.median

    step, gate = times["nmt_moe"]["step"].samples, median("nmt_moe", "gate")
    # The gate was timed separately, so it may seem slower than the layer that contains it.
    rest = max(step.part("forward") + step.part("backward") - gate, 0.0)
    values = gate, rest, step.part("optimizer"), median("bmm", "fwd+bwd")
    return dict(zip((*PARTS, *LINES), (*values, median("nmt_moe_adam", "step")), strict=True))


def draw(document: dict[str, Any], path: Path) -> None:
    """Plot the parts of a step, stacked on each other, against the number of experts.

    Raises:
        ValueError: if fewer than two numbers of experts were measured at one size.
    """
    steps = parts_of_steps(document)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    milliseconds = {name: [1e3 * value for value in of] for name, of in steps.seconds.items()}
    stack = [milliseconds[name] for name in PARTS]
    axes.stackplot(steps.experts, *stack, labels=PARTS, alpha=0.75)
    for name, style in LINES.items():
        axes.plot(steps.experts, milliseconds[name], style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps.experts, [str(count) for count in steps.experts])
    axes.set_xlabel("number of experts")
    axes.set_ylabel("ms per step")
    axes.set_ylim(bottom=0)
    point = steps.point
    axes.set_title(
        f"{point.tokens} tokens, {point.top_k} experts per token, width {point.model_dim}, "
        f"hidden width {point.hidden_dim}\n{document['hardware']}",
        fontsize="small",
    )
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)
