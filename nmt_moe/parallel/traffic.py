"""How many bytes a rank sends to others and how long that takes, for benchmarks and tests."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# Kinds of traffic: rows of tokens and answers; sums for the balance losses.
EXCHANGE, BALANCE = "exchange", "balance"


@dataclass
class Traffic:
    """What this rank sent while it was measured.

    Attributes:
        bytes_sent: To other ranks, by kind. Of a sum over W ranks, what a ring sends: 2 (W - 1) / W
            of the tensor.
        seconds: By kind, waiting for other ranks included.
    """

    bytes_sent: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


# A list, as measurements may be nested. The backward pass may run in threads of torch's, so it is
# no variable of one context or thread.
_meters: list[Traffic] = []


@contextmanager
def measure_traffic() -> Iterator[Traffic]:
    """Count what this rank sends inside the block, backward passes included.

    On a GPU, each exchange then waits for the device before and after, or its time would not show.
    """
    traffic = Traffic()
    _meters.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: equal counts make equal meters.
        del _meters[next(at for at, meter in enumerate(_meters) if meter is traffic)]


@contextmanager
def sending(kind: str, num_bytes: int, device: torch.device) -> Iterator[None]:
    """Count `num_bytes`, and the time that the block takes, if anyone measures."""
    if not _meters:
        yield
        return
    _synchronise(device)
    begin = time.perf_counter()
    yield
    _synchronise(device)
    seconds = time.perf_counter() - begin
    for meter in _meters:
        meter.bytes_sent[kind] += num_bytes
        meter.seconds[kind] += seconds


def ring_bytes(num_bytes: int, world_size: int) -> int:
    """Return what each of the ranks sends to sum up tensors of `num_bytes` in a ring."""
    return 2 * num_bytes * (world_size - 1) // world_size


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
