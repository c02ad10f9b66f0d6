import dataclasses
import io

import pytest

from benchmarks import moe_rounds
from benchmarks.moe_points import Point

POINT = Point(tokens=12, model_dim=8, hidden_dim=12, num_experts=6, top_k=4)
HELD = 100


def labels(point, peers=()):
    return [entrant.label for entrant in moe_rounds.entrants_of(point, list(peers))]


def test_there_are_limits_for_each_number_of_experts_per_token():
    entrants = moe_rounds.entrants_of(POINT, ["lucidrains", "hf_switch"])
    assert [(entrant.label, entrant.point.top_k) for entrant in entrants] == [
        ("gemm", 4),
        ("bmm", 4),
        ("gemm k=2", 2),
        ("bmm k=2", 2),
        ("gemm k=1", 1),
        ("bmm k=1", 1),
        ("nmt_moe", 4),
        ("nmt_moe_adam", 4),
        ("lucidrains", 2),
        ("hf_switch", 1),
    ]


def test_each_competitor_runs_only_what_it_supports():
    point = dataclasses.replace(POINT, modes=("fwd+bwd", "gate", "step"))
    modes = {one.label: one.modes for one in moe_rounds.entrants_of(point, ["deepspeed"])}
    assert modes["bmm"] == ("fwd+bwd",)
    assert modes["nmt_moe"] == ("fwd+bwd", "gate", "step")
    assert modes["nmt_moe_adam"] == ("step",)
    assert modes["deepspeed"] == ("fwd+bwd", "step")
    assert labels(dataclasses.replace(POINT, modes=("step",))) == ["nmt_moe", "nmt_moe_adam"]
    with_groups = dataclasses.replace(POINT, num_groups=3, modes=("forward",))
    assert labels(with_groups) == ["gemm", "bmm", "nmt_moe", "nmt_moe_hierarchical"]


class FakeProcess:
    """A fake process that records events and claims to hold memory; one of the fakes fails."""

    events: list[str] = []
    failing = ""

    def __init__(self, entrant, *_):
        self.label = entrant.label
        self.events.append(f"+{self.label}")

    def call(self, command, within, **arguments):
        del within
        if command == "measure":
            if self.failing in (self.label, f"{self.label} {arguments['mode']}"):
                raise RuntimeError("out of memory")
            self.events.append(f"{self.label} {arguments['mode']}")
            sample = {"seconds": 0.25, "waited": 0.0, "parts": {}}
            return [sample] * arguments["repeats"]
        return {"memory": {"peak": HELD, "held": HELD}, "describe": {}, "dropped": 0.0}[command]

    def close(self, now=False):
        self.events.append(f"{'!' if now else '-'}{self.label}")


@pytest.fixture
def play(monkeypatch):
    """Return a function that runs two rounds at a point with fake processes."""

    def run(free, failing="", modes=("fwd+bwd",)):
        monkeypatch.setattr(FakeProcess, "events", [])
        monkeypatch.setattr(FakeProcess, "failing", failing)
        monkeypatch.setattr(moe_rounds, "Process", FakeProcess)
        monkeypatch.setattr(moe_rounds, "free_bytes", lambda _: free)
        entrants = moe_rounds.entrants_of(dataclasses.replace(POINT, modes=modes), [])
        match = moe_rounds.Match(entrants, "cpu", 1, 60.0, io.StringIO())
        match.play(2)
        return match, FakeProcess.events

    return run


def test_competitors_take_turns_and_keep_running_if_memory_allows(play):
    match, events = play(free=100 * HELD)
    names = ["gemm", "bmm", "nmt_moe"]
    first = [event for name in names for event in (f"+{name}", f"{name} fwd+bwd")]
    second = [f"{name} fwd+bwd" for name in names]
    assert events == [*first, *second, *(f"-{name}" for name in names)]
    assert match.stays
    # A measurement takes a quarter of a second, so the second turn repeats it within half a second.
    counts = [len(samples) for samples in match.records["bmm"].rounds["fwd+bwd"]]
    assert counts == [1, 2]


def test_each_turn_has_its_own_process_if_memory_is_short(play):
    match, events = play(free=3 * HELD)
    assert not match.stays
    second = [
        e
        for name in ("gemm", "bmm", "nmt_moe")
        for e in (f"+{name}", f"{name} fwd+bwd", f"-{name}")
    ]
    assert events[-9:] == second
    # The two processes that were running when memory ran short have been stopped.
    assert events[:-9].count("-gemm") == events[:-9].count("-bmm") == 1


def test_a_competitor_that_fails_is_given_up_and_the_others_continue(play):
    match, events = play(free=100 * HELD, failing="bmm")
    assert match.records["bmm"].skipped == "out of memory"
    assert events.count("+bmm") == events.count("!bmm") == 1
    assert events.count("nmt_moe fwd+bwd") == 2


def test_a_mode_that_fails_is_given_up_together_with_those_that_do_more(play):
    modes = ("forward", "fwd+bwd", "step")
    match, events = play(free=100 * HELD, failing="nmt_moe fwd+bwd", modes=modes)
    record = match.records["nmt_moe"]
    assert record.skipped is None
    assert record.failed == {"fwd+bwd": "out of memory", "step": "out of memory"}
    assert len(record.rounds["forward"]) == 2
    assert [event for event in events if "nmt_moe" in event and "adam" not in event] == [
        "+nmt_moe",
        "nmt_moe forward",
        "!nmt_moe",
        "+nmt_moe",
        "nmt_moe forward",
        "-nmt_moe",
    ]


def test_a_worker_reports_errors_and_its_end_and_continues_after_errors():
    entrant = moe_rounds.entrants_of(dataclasses.replace(POINT, modes=("forward",)), [])[-1]
    with open("/dev/null", "w") as log:
        process = moe_rounds.Process(entrant, "cpu", 1, log)
        with pytest.raises(RuntimeError, match="AttributeError: .* no attribute 'sing'"):
            process.call("sing", 60.0)
        assert len(process.call("measure", 60.0, mode="forward", warmup=0, repeats=2)) == 2
        with pytest.raises(RuntimeError, match="measure took more than 0 s"):
            process.call("measure", 0.0, mode="forward", warmup=0, repeats=20)
        process._process.kill()
        with pytest.raises(RuntimeError, match="its process ended with status -9"):
            process.call("memory", 60.0)
        process.close()
