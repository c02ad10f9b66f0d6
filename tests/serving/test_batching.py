"""The queue translates waiting requests together, drops cancelled ones and isolates failures."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from nmt_moe.serving import batching
from nmt_moe.serving.batching import BATCH_CHARACTERS, Batcher, Job, Search
from tests.support.serving import PATIENCE


class Recorder:
    """A fake translator that answers in capitals, records its batches, and can be paused."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def translate(self, lines: Sequence[str], *_: Any, **__: Any) -> list[Any]:
        self.batches.append(list(lines))
        self.entered.release()
        assert self.gate.acquire(timeout=PATIENCE)
        if "bad" in lines:
            raise RuntimeError("bad")
        return [SimpleNamespace(text=line.upper()) for line in lines]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def batcher():
    made = Batcher()
    made.start()
    yield made
    made.close()


def submit(batcher: Batcher, recorder: Any, *lines: str, beam: int = 1) -> Job:
    job = Job(Search(recorder, None, beam), lines)
    batcher.submit(job)
    return job


def hold(batcher: Batcher, recorder: Recorder) -> Job:
    """Submit a job and wait until the thread is busy with it."""
    job = submit(batcher, recorder, "first")
    assert recorder.entered.acquire(timeout=PATIENCE)
    return job


def texts(job: Job) -> list[str]:
    return [one.text for one in job.done.result(PATIENCE)]


def test_waiting_requests_are_translated_together(batcher: Batcher, recorder: Recorder):
    first = hold(batcher, recorder)
    jobs = [submit(batcher, recorder, f"line {n}") for n in range(5)]
    recorder.gate.release(2)
    assert texts(first) == ["FIRST"]
    assert [texts(job) for job in jobs] == [[f"LINE {n}"] for n in range(5)]
    assert recorder.batches == [["first"], [f"line {n}" for n in range(5)]]


def test_requests_with_other_options_form_another_batch(batcher: Batcher, recorder: Recorder):
    hold(batcher, recorder)
    jobs = [submit(batcher, recorder, str(n), beam=1 + n % 2) for n in range(4)]
    recorder.gate.release(3)
    assert [texts(job) for job in jobs] == [["0"], ["1"], ["2"], ["3"]]
    assert recorder.batches[1:] == [["0", "2"], ["1", "3"]]


def test_a_long_request_does_not_hold_up_a_short_one(batcher: Batcher, recorder: Recorder):
    hold(batcher, recorder)
    line = "x" * (BATCH_CHARACTERS // 4)
    long = submit(batcher, recorder, *[line] * 9)
    short = submit(batcher, recorder, "short")
    recorder.gate.release(9)
    assert texts(short) == ["SHORT"]
    assert texts(long) == [line.upper()] * 9
    assert recorder.batches[1] == [line, "short", line, line]
    assert all(sum(map(len, batch)) <= BATCH_CHARACTERS for batch in recorder.batches)


def test_a_line_longer_than_a_batch_is_translated(batcher: Batcher, recorder: Recorder):
    recorder.gate.release(1)
    line = "x" * (2 * BATCH_CHARACTERS)
    assert texts(submit(batcher, recorder, line)) == [line.upper()]


def test_a_failure_affects_only_its_request(batcher: Batcher, recorder: Recorder):
    hold(batcher, recorder)
    jobs = [submit(batcher, recorder, *lines) for lines in (["a", "b"], ["c", "bad"], ["d"])]
    recorder.gate.release(100)
    assert texts(jobs[0]) == ["A", "B"]
    assert texts(jobs[2]) == ["D"]
    with pytest.raises(RuntimeError, match="bad"):
        texts(jobs[1])
    assert texts(submit(batcher, recorder, "e")) == ["E"]


def test_a_cancelled_job_is_dropped(batcher: Batcher, recorder: Recorder):
    hold(batcher, recorder)
    dropped, kept = submit(batcher, recorder, "dropped"), submit(batcher, recorder, "kept")
    batcher.cancel(dropped)
    recorder.gate.release(2)
    assert texts(kept) == ["KEPT"]
    assert recorder.batches[1:] == [["kept"]]
    assert not dropped.done.done()
    batcher.cancel(kept)  # too late to have an effect, but allowed


def test_a_single_client_never_waits(recorder: Recorder, monkeypatch):
    """Check that a client's next request is not mistaken for another client's."""
    monkeypatch.setattr(batching, "MAX_WAIT", PATIENCE)
    monkeypatch.setattr(batching, "RECENT", PATIENCE)
    batcher = Batcher()
    batcher.start()
    recorder.gate.release(2)
    first, second = (Job(Search(recorder, None, 1), [word]) for word in ("a", "b"))
    first.done.add_done_callback(lambda _: batcher.submit(second))  # runs in the queue's thread
    batcher.submit(first)
    assert [one.text for one in second.done.result(PATIENCE / 2)] == ["B"]
    batcher.close()


def test_closing_translates_waiting_requests(recorder: Recorder):
    batcher = Batcher()
    batcher.start()
    hold(batcher, recorder)
    job = submit(batcher, recorder, "last")
    recorder.gate.release(2)
    batcher.close()
    assert texts(job) == ["LAST"]
    with pytest.raises(RuntimeError, match="closed"):
        submit(batcher, recorder, "more")


def test_without_batching_requests_are_translated_one_by_one(recorder: Recorder):
    batcher = Batcher(is_batching=False)
    batcher.start()
    hold(batcher, recorder)
    jobs = [submit(batcher, recorder, *"ab"), submit(batcher, recorder, "c")]
    recorder.gate.release(3)
    assert [texts(job) for job in jobs] == [["A", "B"], ["C"]]
    assert recorder.batches[1:] == [["a", "b"], ["c"]]
    batcher.close()
