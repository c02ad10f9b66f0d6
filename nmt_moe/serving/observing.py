"""Collect metrics for Prometheus, and write logs as JSON lines. Neither contains users' text."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

LOGGER = "nmt_moe.serving"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics that `/metrics` shows.

    Args:
        num_waiting: Function that returns the number of requests waiting for a batch.
        num_open: Function that returns the number of requests being read, waiting or being
            translated.
    """

    def __init__(self, num_waiting: Callable[[], int], num_open: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="nmt_moe", registry=self.registry)
        histogram = partial(Histogram, namespace="nmt_moe", registry=self.registry)
        gauge = partial(Gauge, namespace="nmt_moe", registry=self.registry)
        self.requests = counter("requests", "Number of answered requests.", ["path", "status"])
        self.seconds = histogram(
            "request_seconds",
            "Time from request head to response, in seconds.",
            ["path"],
            buckets=SECONDS,
        )
        self.characters = counter("characters", "Number of characters in texts to translate.")
        self.batch_requests = histogram(
            "batch_requests", "Number of requests in a batch.", buckets=COUNTS
        )
        self.batch_lines = histogram("batch_lines", "Number of lines in a batch.", buckets=COUNTS)
        self.batch_seconds = histogram(
            "batch_seconds", "Time to translate a batch, in seconds.", buckets=SECONDS
        )
        gauge("waiting_requests", "Number of requests waiting for a batch.").set_function(
            num_waiting
        )
        gauge(
            "open_requests", "Number of requests being read, waiting or being translated."
        ).set_function(num_open)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def observe_batch(self, num_requests: int, num_lines: int, seconds: float) -> None:
        """Record a batch."""
        self.batch_requests.observe(num_requests)
        self.batch_lines.observe(num_lines)
        self.batch_seconds.observe(seconds)

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Record a request; `path` is its route's path, which keeps the number of paths small."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)


class JsonLines(logging.Formatter):
    """A formatter that writes time, level, event and `extra["fields"]` as a line of JSON.

    Only the type of an exception and its place in the code are written, because its message may
    quote text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        content: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            content["error"] = type(record.exc_info[1]).__name__
            content["at"] = [f"{frame.filename}:{frame.lineno}" for frame in frames[-5:]]
        return json.dumps(content, ensure_ascii=False)


def log_as_json() -> None:
    """Write the server's logs and its libraries' errors to standard error as lines of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("", logging.ERROR), (LOGGER, logging.INFO)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
