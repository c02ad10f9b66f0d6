"""Measure how many bytes a rank sends to other ranks, and how long that takes."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

from nmt_moe.parallel import ring_bytes


@dataclass
class Traffic:
    """The traffic of this rank during a measurement.

    Attributes:
        bytes_sent: Bytes sent to other ranks. "exchange" counts the rows of tokens sent by
            all-to-all, and the messages that announce their number. "sum" counts each all-reduce
            as if it ran in a ring of W ranks, where each rank sends 2 (W - 1) / W of the tensor.
        seconds: Times under the same names, including the time spent waiting for other ranks.
    """

    bytes_sent: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, kind: str, num_bytes: int, device: torch.device, call: Callable[[], Any]) -> Any:
        """Run `call`, which sends `num_bytes`, and add its bytes and time to the totals."""
        _synchronise(device)
        begin = time.perf_counter()
        result = call()
        _synchronise(device)
        self.seconds[kind] += time.perf_counter() - begin
        self.bytes_sent[kind] += num_bytes
        return result


@contextmanager
def measure_traffic() -> Iterator[Traffic]:
    """Measure the traffic of this rank inside the `with` block, including backward passes.

    On a GPU, each call waits for the device before and after, because otherwise its time could not
    be measured.
    """
    traffic = Traffic()
    all_to_all, all_reduce = distributed.all_to_all_single, distributed.all_reduce

    def exchange(
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        group: Any = None,
    ) -> Any:
        others = sum(input_split_sizes) - input_split_sizes[distributed.get_rank(group)]
        num_bytes = others * input[:1].nbytes if len(input) else 0
        splits = output_split_sizes, input_split_sizes
        return traffic.add(
            "exchange", num_bytes, input.device, lambda: all_to_all(output, input, *splits, group)
        )

    def reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        num_bytes = ring_bytes(tensor.nbytes, distributed.get_world_size(kwargs.get("group")))
        return traffic.add(
            "sum", num_bytes, tensor.device, lambda: all_reduce(tensor, *args, **kwargs)
        )

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(distributed, "all_to_all_single", exchange))
        stack.enter_context(mock.patch.object(distributed, "all_reduce", reduce))
        yield traffic


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
