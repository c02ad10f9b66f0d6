"""Measure competitors in rounds, each competitor in its own process.

In the first round, each process is started when its turn comes. As long as all processes fit
into memory together, they keep running; otherwise a new process is started for every turn.
"""

import contextlib
import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import IO, Any

from benchmarks import moe_gating, timing
from benchmarks.moe_layers import OWN
from benchmarks.moe_limits import LIMITS
from benchmarks.moe_peers import LAYERS
from benchmarks.moe_points import BARE, Point

# In a turn, a short job is repeated for about TURN_SECONDS, but at most MOST_REPEATS times.
TURN_SECONDS, MOST_REPEATS = 0.5, 20
# Importing, starting kernels on a GPU and initialising weights may take this many seconds in all.
START_SECONDS = 300.0


@dataclass(frozen=True)
class Entrant:
    """A competitor at a point.

    Attributes:
        name: Name of the competitor.
        point: The size, with a number of experts per token that the competitor supports.
        modes: The modes to time.
        label: The name, with the number of experts per token if it is not the requested one.
    """

    name: str
    point: Point
    modes: tuple[str, ...]
    label: str


@dataclass
class Record:
    """All results of an entrant.

    Attributes:
        rounds: The samples of each round, by mode; see `Worker.measure`.
        peaks: Peak bytes for each mode, including the modes before it.
        facts: Results of `describe` and `dropped`.
        failed: Why a mode was abandoned, by mode.
        skipped: Why everything was abandoned, or None.
    """

    name: str
    label: str
    top_k: int
    rounds: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None

    def repeats(self, mode: str) -> int:
        """Return how many times to run the mode in the next turn."""
        known = [sample["seconds"] for samples in self.rounds.get(mode, []) for sample in samples]
        if not known:
            return 1
        return max(1, min(MOST_REPEATS, int(TURN_SECONDS / statistics.median(known))))


class Process:
    """A worker process.

    Raises:
        RuntimeError: in any call, if the worker reports an error, dies or is too slow.
    """

    def __init__(self, entrant: Entrant, device: str, threads: int, log: IO[str]) -> None:
        settings = {
            "name": entrant.name,
            "point": dataclasses.asdict(entrant.point),
            "modes": entrant.modes,
            "device": device,
            "threads": threads,
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.moe_worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
            env=environment,
            cwd=timing.REPOSITORY,
        )

    def call(self, command: str, within: float, **arguments: Any) -> Any:
        """Send a command, and wait at most `within` seconds for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has died, which is reported below
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        if not select.select([self._process.stdout], [], [], within)[0]:
            raise RuntimeError(f"{command} took more than {within:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with status {self._process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found["ok"]

    def close(self, now: bool = False) -> None:
        """End the process by closing its input or, if `now` is true, by killing it."""
        if now:
            self._process.kill()
        self._process.communicate()


def entrants_of(point: Point, peers: list[str]) -> list[Entrant]:
    """List the entrants at a point: limits for each k, nmt_moe's layers, and peers."""
    if point.kind == "gating":
        return [Entrant(name, point, point.modes, name) for name in moe_gating.NAMES]
    own = ["nmt_moe", *(["nmt_moe_hierarchical"] if point.num_groups else [])]
    own += ["nmt_moe_adam"] if "step" in point.modes else []
    names = list(dict.fromkeys([*own, *point.yardsticks, *peers]))
    layers = [_enter(name, point) for name in names]
    bare_modes = tuple(mode for mode in point.modes if mode in BARE)
    ks = sorted({layer.point.top_k for layer in layers}, reverse=True) if bare_modes else []
    limits = [
        Entrant(name, small, bare_modes, limit_label(name, top_k, point))
        for top_k in ks
        for small in [dataclasses.replace(point, top_k=top_k)]
        for name in LIMITS
    ]
    return [entrant for entrant in limits + layers if entrant.modes]


def limit_label(name: str, top_k: int, point: Point) -> str:
    """Return the label of a limit for `top_k` experts per token."""
    return name if top_k == point.top_k else f"{name} k={top_k}"


def _enter(name: str, point: Point) -> Entrant:
    top_k = min(point.top_k, LAYERS[name].most_k)
    modes = tuple(mode for mode in point.modes if mode != "gate" or name in OWN)
    if not LAYERS[name].has_backward:
        modes = tuple(mode for mode in modes if mode == "forward")
    if name == "nmt_moe_adam":
        modes = tuple(mode for mode in modes if mode == "step")
    return Entrant(name, dataclasses.replace(point, top_k=top_k), modes, name)


class Match:
    """All rounds at one point.

    Attributes:
        records: The results by label, in the order of turns.
        stays: Whether processes keep running between turns.
    """

    def __init__(
        self, entrants: list[Entrant], device: str, threads: int, step_limit: float, log: IO[str]
    ) -> None:
        self.entrants, self.device, self.threads = entrants, device, threads
        self.step_limit, self.log = step_limit, log
        self.records = {one.label: Record(one.name, one.label, one.point.top_k) for one in entrants}
        self.stays = True
        self._processes: dict[str, Process] = {}
        self._free = free_bytes(device)
        self._held, self._largest = 0, 0

    def play(self, rounds: int) -> None:
        """Run all rounds."""
        begin = time.perf_counter()
        try:
            for at in range(rounds):
                for entrant in self.entrants:
                    if self.records[entrant.label].skipped is None:
                        self._take_turn(entrant)
                left = (time.perf_counter() - begin) / (at + 1) * (rounds - at - 1)
                timing.say(f"  {at + 1} of {rounds} rounds done, about {left:.0f} s left")
        finally:
            self._close_all()

    def _take_turn(self, entrant: Entrant) -> None:
        record = self.records[entrant.label]
        is_new = not record.facts
        if is_new:
            timing.say(f"  {entrant.label}")
        process = self._processes.pop(entrant.label, None)
        if process is None:
            process = Process(entrant, self.device, self.threads, self.log)
        todo = [mode for mode in entrant.modes if mode not in record.failed]
        try:
            process.call("describe", START_SECONDS)  # answered once the competitor is built
            while todo:
                self._measure(process, record, todo[0])
                del todo[0]
            memory = process.call("memory", START_SECONDS)
            if is_new:
                facts = process.call("describe", START_SECONDS)
                record.facts = facts | {"dropped": process.call("dropped", self.step_limit)}
        except RuntimeError as error:
            process.close(now=True)
            self._give_up(record, todo, str(error))
            return
        if is_new:
            self._decide(memory)
        if self.stays:
            self._processes[entrant.label] = process
        else:
            process.close()

    def _give_up(self, record: Record, todo: list[str], reason: str) -> None:
        """Abandon the remaining modes, or the entrant if no mode was measured or none remains."""
        timing.say(f"  {record.label}: {' and '.join(todo) or 'all'} abandoned: {reason}")
        if record.rounds.keys() - todo and todo:
            record.failed |= dict.fromkeys(todo, reason)
        else:
            record.skipped = reason

    def _measure(self, process: Process, record: Record, mode: str) -> None:
        repeats = record.repeats(mode)
        samples = process.call(
            "measure",
            within=self.step_limit * (1 + repeats),
            mode=mode,
            warmup=1,
            repeats=repeats,
        )
        if mode not in record.peaks:
            record.peaks[mode] = process.call("memory", START_SECONDS)["peak"]
        record.rounds.setdefault(mode, []).append(samples)

    def _decide(self, memory: dict[str, int]) -> None:
        """Stop keeping processes running if one more might not fit into memory.

        It is assumed to be as large as the largest so far.
        """
        self._held += memory["held"]
        self._largest = max(self._largest, memory["peak"], memory["held"])
        if self.stays and self._held + 1.3 * self._largest > self._free:
            timing.say("  memory is low: from now on, a new process is started for each turn")
            self.stays = False
            self._close_all()

    def _close_all(self) -> None:
        for process in self._processes.values():
            process.close()
        self._processes.clear()


def free_bytes(device: str) -> int:
    """Return how many bytes competitors may use on the machine or its GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return timing.available_bytes() - 2**30


def play_point(
    point: Point, peers: list[str], rounds: int, match_of: dict[str, Any]
) -> dict[str, Any]:
    """Measure a point, and return the results that --json stores."""
    timing.say(f"{point}: {point.rows_per_expert:.3g} rows per expert")
    match = Match(entrants_of(point, peers), **match_of)
    match.play(rounds)
    return {
        "point": dataclasses.asdict(point),
        "competitors": [dataclasses.asdict(record) for record in match.records.values()],
        "processes_stayed": match.stays,
    }
