"""Run a function in several processes that use gloo over the loopback interface."""

import multiprocessing
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed

# Importing torch and the project takes seconds, so each process is forked from one that has already
# imported them.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.imported"])


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Return what `function(rank, *arguments)` returned in each process, by rank.

    Results are pickled, so `function` must return numbers and arrays instead of tensors.
    """
    port = free_port()
    results = CONTEXT.Queue()
    ranks = [
        CONTEXT.Process(
            target=_run_rank,
            args=(function, rank, world_size, port, results, arguments),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    answers: dict[int, Any] = {}
    try:
        for _ in ranks:
            rank, answer, error = results.get(timeout=500)
            if error:
                pytest.fail(f"rank {rank}:\n{error}")
            answers[rank] = answer
    except queue.Empty:
        pytest.fail(f"exit codes of the ranks: {[process.exitcode for process in ranks]}")
    finally:
        for process in ranks:
            process.join(10 if len(answers) == world_size else 0)
            process.kill()
    return [answers[rank] for rank in range(world_size)]


def _run_rank(function, rank, world_size, port, results, arguments) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    try:
        answer = function(rank, *arguments)
    except Exception:
        results.put((rank, None, traceback.format_exc()))
        raise
    results.put((rank, answer, None))
    distributed.barrier()
    distributed.destroy_process_group()
