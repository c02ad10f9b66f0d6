"""Time competitors side by side, and print the results.

In each round, every competitor is measured once, A B C ... A B C ..., so that a temporary slowdown
of the machine affects all of them equally; medians over the rounds are compared.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Child processes start in this folder, so that they can import the benchmarks' modules.
REPOSITORY = Path(__file__).resolve().parent.parent
# A job runs a competitor once, and may return how many seconds each part took.
Job = Callable[[], Mapping[str, float] | None]


@dataclass
class Samples:
    """Times of one competitor in seconds, one per round.

    Attributes:
        seconds: Seconds of the whole job.
        parts: Seconds of its named parts.
    """

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Return the median time of the whole job."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Return (slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def part(self, name: str) -> float:
        """Return the median time of one part."""
        return statistics.median(self.parts[name])


def interleave(
    jobs: Mapping[str, Job], rounds: int, device: str = "cpu", warmup: int = 1
) -> dict[str, Samples]:
    """Run all jobs in turn, in `warmup` unmeasured rounds and then in `rounds` measured ones."""
    samples = {name: Samples() for name in jobs}
    start = time.perf_counter()
    for at in range(-warmup, rounds):
        for name, job in jobs.items():
            if at < 0:
                say(f"warm-up: {name}")
            synchronise(device)
            begin = time.perf_counter()
            parts = job()
            synchronise(device)
            seconds = time.perf_counter() - begin
            if at >= 0:
                samples[name].seconds.append(seconds)
                for part, value in (parts or {}).items():
                    samples[name].parts.setdefault(part, []).append(value)
        done = at + 1 + warmup
        left = (time.perf_counter() - start) / done * (rounds + warmup - done)
        say(f"{done} of {rounds + warmup} rounds done, about {left:.0f} s left")
    return samples


def synchronise(device: str) -> None:
    """Wait until the device has finished all work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Return this process's peak memory: allocated on the GPU, or resident on the CPU.

    `ru_maxrss` is not used because it starts at the size of the parent process.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return _kernel_bytes("/proc/self/status", "VmHWM")


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return _kernel_bytes("/proc/self/status", "VmRSS")


def available_bytes() -> int:
    """Return the machine's available memory."""
    return _kernel_bytes("/proc/meminfo", "MemAvailable")


def _kernel_bytes(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} has no {field}")


def describe_hardware(device: str, threads: int) -> str:
    """Describe the hardware and the software versions."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    cores = os.cpu_count()
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, {versions}"
    return f"{cpu_model()}, threads: {threads} on {cores} cores, {versions}"


def cpu_model() -> str:
    """Name the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table with the first column aligned left and all others aligned right."""
    lines = [list(columns), ["---", *["--:"] * (len(columns) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all benchmark programs share."""
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (7)")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch uses (2)")
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cpu or cuda (cpu)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and tokens (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all samples to FILE")


def prepare(args: argparse.Namespace) -> None:
    """Apply the common flags.

    Raises:
        SystemExit: if a flag has an invalid value, or the requested GPU is missing.
    """
    if args.rounds < 1 or args.threads < 1:
        sys.exit(
            f"--rounds and --threads must be at least 1, but are {args.rounds} and {args.threads}."
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU. Use --device cpu.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def write_json(path: Path | None, args: argparse.Namespace, hardware: str, rows: Any) -> None:
    """Write the settings, the hardware and every sample, if a file was named."""
    if path is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        found = {"settings": settings, "hardware": hardware, "rows": rows}
        path.write_text(json.dumps(found, indent=1, default=str) + "\n")


def say(message: str) -> None:
    """Print a message about progress to stderr."""
    print(message, file=sys.stderr, flush=True)
