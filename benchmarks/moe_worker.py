"""Measure one competitor in its own process, which reads commands from standard input.

moe_rounds.py starts the process with one argument, a JSON object. Each line of standard input is
also a JSON object, and is answered by a line on standard output. The libraries' output goes to
stderr.
"""

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import moe_gating, timing
from benchmarks.moe_layers import OWN, Layer, OwnLayer, build_layer
from benchmarks.moe_limits import LIMITS, BareProducts
from benchmarks.moe_peers import LAYERS
from benchmarks.moe_points import Point
from nmt_moe import training

# This many bytes of the initially free memory are left to other processes.
_KEPT_FREE = 2**30


class Competitor(Protocol):
    """The interface of a competitor that a worker measures."""

    def run(self, mode: str) -> dict[str, float] | None:
        """Run a mode once, and return how many seconds each part took, if known."""

    def rest(self) -> None:
        """Free the memory that is needed only during a run."""

    def dropped(self) -> float | None:
        """Return the share of (token, expert) pairs not computed, or None if there are no pairs."""

    def describe(self) -> dict[str, Any]:
        """Return the facts that the tables show."""


class LayerRun:
    """A layer in training or evaluation on one batch of standard normal tokens."""

    def __init__(self, name: str, point: Point, device: str) -> None:
        self.device = device
        self.layer = build_layer(LAYERS[name], point, device)
        self.parameters = list(self.layer.parameters())
        self.factored = name in OWN and not name.endswith("_adam")
        self.optimizer: torch.optim.Optimizer | None = None
        generator = torch.Generator().manual_seed(2)
        shape = point.tokens, point.model_dim
        dtype = getattr(torch, point.dtype)
        self.x = torch.randn(shape, generator=generator).to(device, dtype)
        self.grad_y = (torch.randn(shape, generator=generator) / point.tokens).to(device, dtype)

    def run(self, mode: str) -> dict[str, float] | None:
        """Run a forward pass, a training pass, the gate's training pass, or a complete update."""
        self.layer.train(mode != "forward")
        if mode == "forward":
            with torch.no_grad():
                self.layer(self.x)
            return None
        marks = [self._now()]
        # Start with fresh gradients, as in training.
        self.rest()
        x = self.x.detach().requires_grad_()
        if mode == "gate":
            assert isinstance(self.layer, OwnLayer)
            self.layer.gate_alone(x).backward()
            return None
        y, loss = self.layer(x)
        marks.append(self._now())
        self._backward(y, loss)
        if mode == "fwd+bwd":
            return None
        marks.append(self._now())
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.layer, self.factored, self.device)
        self.optimizer.step()
        marks.append(self._now())
        parts = ("forward", "backward", "optimizer")
        return {part: marks[at + 1] - marks[at] for at, part in enumerate(parts)}

    def rest(self) -> None:
        """Free all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def dropped(self) -> float:
        """Run once, and return the share of pairs not computed."""
        return 1 - self.layer.computed_pairs(self.x) / (len(self.x) * self.layer.top_k)

    def describe(self) -> dict[str, Any]:
        """Return the facts that the tables show."""
        return {
            "notes": self.layer.notes,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "optimizer": type(self.optimizer).__name__ if self.optimizer else None,
        }

    def _backward(self, y: Tensor, loss: Tensor | None) -> None:
        outputs, grads = [y], [self.grad_y]
        if loss is not None and loss.requires_grad:
            outputs.append(loss.reshape(()))
            grads.append(torch.ones_like(outputs[1]))
        torch.autograd.backward(outputs, grads)

    def _now(self) -> float:
        timing.synchronise(self.device)
        return time.perf_counter()


def make_optimizer(layer: Layer, factored: bool, device: str) -> torch.optim.Optimizer:
    """Make a layer's optimizer: torch's fastest Adam, or factored Adam for nmt_moe's layers."""
    if factored:
        return training.FactoredAdam(layer.parameters(), lr=1e-4)
    fastest = {"foreach": True} if device == "cuda" else {"fused": True}
    return torch.optim.Adam(layer.parameters(), lr=1e-4, **fastest)


def build(name: str, point: Point, device: str) -> Competitor:
    """Make any competitor."""
    if name in LIMITS:
        return BareProducts(name, point, device)
    if name in moe_gating.NAMES:
        return moe_gating.GatingRun(name, point, device)
    return LayerRun(name, point, device)


def waited_seconds() -> float:
    """Return the total time that this process's live threads have waited for a core."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except OSError:  # the thread has ended
            continue
    return total / 1e9


class Worker:
    """One competitor, with a method for each command.

    Attributes:
        competitor: The layer, gate or products to measure.
    """

    def __init__(self, name: str, point: Point, device: str, modes: list[str]) -> None:
        self.device = device
        tiny = build(name, point.smaller(), device)
        for mode in modes:
            tiny.run(mode)
        del tiny
        self._before = self._held()
        self.competitor = build(name, point, device)

    def describe(self) -> dict[str, Any]:
        """Return the facts that the tables show."""
        return self.competitor.describe()

    def measure(self, mode: str, warmup: int, repeats: int) -> list[dict[str, Any]]:
        """Run a mode `warmup` times without timing, and then `repeats` times with timing.

        Returns:
            `seconds`, `waited` (how long threads waited for a core) and `parts` of each timed run.
        """
        samples = []
        for at in range(-warmup, repeats):
            timing.synchronise(self.device)
            waited = waited_seconds()
            begin = time.perf_counter()
            parts = self.competitor.run(mode)
            timing.synchronise(self.device)
            seconds = time.perf_counter() - begin
            waited = waited_seconds() - waited
            if at >= 0:
                samples.append({"seconds": seconds, "waited": waited, "parts": parts or {}})
        self.competitor.rest()
        return samples

    def memory(self) -> dict[str, int]:
        """Return the peak above the memory at the start, and the memory held now, in bytes."""
        peak = timing.peak_bytes(self.device) - self._before
        if self.device == "cuda":
            torch.cuda.empty_cache()
            return {"peak": peak, "held": torch.cuda.memory_reserved()}
        return {"peak": peak, "held": self._held()}

    def dropped(self) -> float | None:
        """Return the share of pairs not computed."""
        return self.competitor.dropped()

    def _held(self) -> int:
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        return timing.resident_bytes()


def limit_memory() -> None:
    """Make allocations beyond the free memory fail, so that the system does not kill processes."""
    free = timing.available_bytes() - _KEPT_FREE
    resource.setrlimit(resource.RLIMIT_DATA, (free, free))


def main() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    if settings["device"] == "cpu":
        limit_memory()
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if worker is None:
                point = Point.from_json(settings["point"])
                worker = Worker(settings["name"], point, settings["device"], settings["modes"])
            found = {"ok": getattr(worker, command.pop("command"))(**command)}
        except Exception as error:  # any library may raise any error; report it and continue
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            found = {"error": f"{type(error).__name__}: {first[:200]}"}
        answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
