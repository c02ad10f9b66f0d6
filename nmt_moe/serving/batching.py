"""Translate the lines of all waiting requests together, in one thread.

The thread picks the request that has waited longest and all other requests for the same search. It
takes one line from each in turn, so that a long request does not hold up short ones. Meanwhile, new
requests queue up. If there are several clients, the ones that have just received an answer may be
about to send more requests. Only in this case does the thread wait, for at most `MAX_WAIT` seconds,
until there are as many requests as before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from nmt_moe.inference import Translation, Translator

logger = logging.getLogger(__name__)

# Number of characters that fill a batch. Pieces are known only after a model has split the text. A
# piece has about four characters, so this is about a thousand pieces.
BATCH_CHARACTERS = 4096
# The longest wait for more requests, and the time after a batch during which the thread may wait,
# in seconds.
MAX_WAIT = 0.02
RECENT = 0.1


@dataclass(frozen=True)
class Search:
    """Settings that must be equal for lines to be translated together."""

    translator: Translator
    target_lang: str | None
    beam_size: int
    num_hypotheses: int = 1
    with_experts: bool = False
    length_penalty_alpha: float | None = None
    coverage_penalty_beta: float | None = None

    def translate(self, lines: Sequence[str]) -> list[Translation]:
        """Translate lines with these settings."""
        return self.translator.translate(
            lines,
            self.target_lang,
            beam_size=self.beam_size,
            num_hypotheses=self.num_hypotheses,
            with_experts=self.with_experts,
            length_penalty_alpha=self.length_penalty_alpha,
            coverage_penalty_beta=self.coverage_penalty_beta,
        )


class Job:
    """The lines of one request.

    Attributes:
        search: Options for translating the lines.
        lines: At least one line with text.
        done: Translations of the lines, in order, once they are ready.
    """

    def __init__(self, search: Search, lines: Sequence[str]) -> None:
        self.search, self.lines = search, list(lines)
        self.done: Future[list[Translation]] = Future()
        self.done.set_running_or_notify_cancel()  # from now on only the batcher completes it
        self._num_taken = 0
        self._results: dict[int, Translation] = {}

    @property
    def has_more(self) -> bool:
        """Return whether there are lines that no batch has taken."""
        return self._num_taken < len(self.lines) and not self.done.done()

    @property
    def next_line(self) -> str:
        """Return the next line, without taking it."""
        return self.lines[self._num_taken]

    def take(self) -> int:
        """Take the next line, and return its index."""
        self._num_taken += 1
        return self._num_taken - 1

    def put(self, index: int, result: Translation | Exception) -> None:
        """Store a line's result. The last result, or the first failure, completes the job."""
        if isinstance(result, Exception):
            if not self.done.done():
                self.done.set_exception(result)
            return
        self._results[index] = result
        if len(self._results) == len(self.lines):
            self.done.set_result([self._results[index] for index in range(len(self.lines))])


class Batcher:
    """A queue of jobs, and the thread that translates their lines.

    Args:
        num_threads: Number of threads that torch uses in the translating thread; None for torch's
            default.
        is_batching: Whether to translate requests together instead of one after another.
        observe: Function called after each batch with its number of requests, its number of lines,
            and its duration in seconds.
    """

    def __init__(
        self,
        num_threads: int | None = None,
        is_batching: bool = True,
        observe: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self._num_threads, self._is_batching = num_threads, is_batching
        self._observe = observe or (lambda jobs, lines, seconds: None)
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._num_expected, self._answered = 0, 0.0
        self._thread = threading.Thread(target=self._work, name="translations", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Translate all waiting jobs, and then end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Return the number of jobs with lines that no batch has taken."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Add a job to the queue."""
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job's remaining lines; its `done` is never set afterwards."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def _work(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)  # for this thread
        while True:
            with self._changed:
                while not self._jobs and not self._is_closing:
                    self._changed.wait()
                if not self._jobs:
                    return
                self._wait_for_others()
                taken = self._take() if self._jobs else []
            if taken:
                self._translate(taken)

    def _wait_for_others(self) -> None:
        now = time.monotonic()
        if now - self._answered > RECENT:
            return
        end = now + MAX_WAIT
        while len(self._jobs) < self._num_expected and not self._is_closing:
            left = end - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _take(self) -> list[tuple[Job, int]]:
        first = self._jobs[0]
        same = deque(job for job in self._jobs if job.search == first.search)
        if not self._is_batching:
            same = deque([first])
        taken: list[tuple[Job, int]] = []
        num_characters = 0
        while same:
            num_characters += len(same[0].next_line)
            if taken and num_characters > BATCH_CHARACTERS:
                break
            job = same.popleft()
            taken.append((job, job.take()))
            if job.has_more:
                same.append(job)
        served = {id(job) for job, _ in taken}
        left = [job for job in self._jobs if job.has_more]
        left.sort(key=lambda job: id(job) in served)  # stable sort: jobs not served come first
        self._jobs = deque(left)
        return taken

    def _translate(self, taken: list[tuple[Job, int]]) -> None:
        started = time.monotonic()
        search = taken[0][0].search
        lines = [job.lines[index] for job, index in taken]
        results: Sequence[Translation | Exception]
        try:
            results = search.translate(lines)
        except Exception:  # any exception, because a failed request must not fail the others
            logger.warning("a batch failed; translating its lines one by one")
            results = [_translate_one(search, line) for line in lines]
        jobs = {id(job): job for job, _ in taken}
        self._answered = time.monotonic()
        self._observe(len(jobs), len(taken), self._answered - started)
        # Count these before answering, because clients may reply with new requests immediately.
        num_others = len(self._jobs)
        for (job, index), result in zip(taken, results, strict=True):
            job.put(index, result)
        if self._is_batching:
            self._num_expected = num_others + sum(job.done.done() for job in jobs.values())


def _translate_one(search: Search, line: str) -> Translation | Exception:
    try:
        return search.translate([line])[0]
    except Exception as error:
        return error
