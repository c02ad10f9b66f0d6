"""The facts about their machine that users paste into bug reports."""

import os

import torch

from nmt_moe.diagnostics import collect_facts, facts


def test_facts_are_those_of_this_process(monkeypatch):
    monkeypatch.setenv("NMT_MOE_TRACEBACK", "1")
    monkeypatch.setenv("SECRET_KEY", "hidden")
    found = collect_facts()
    assert found["packages"]["torch"] == torch.__version__
    assert found["processor"]["threads"] == torch.get_num_threads()
    assert found["processor"]["torch uses"] == torch.backends.cpu.get_cpu_capability()
    assert found["environment"]["NMT_MOE_TRACEBACK"] == "1"
    assert "hidden" not in str(found)


def test_a_users_name_is_not_shown(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("PYTHONPATH", "/home/somebody/code:/opt")
    assert collect_facts()["environment"]["PYTHONPATH"] == "~/code:/opt"


def test_a_machine_without_proc_or_a_compiler_is_described_too(monkeypatch):
    read = facts.Path.read_text

    def refuse(self, *args, **options):
        if str(self).startswith(("/proc", "/sys")):
            raise OSError("no such file")
        return read(self, *args, **options)

    monkeypatch.setattr(facts.Path, "read_text", refuse)
    monkeypatch.setenv("PATH", "/nowhere")
    found = collect_facts()
    assert found["software"]["compiler"] is None
    assert found["memory"]["total"] is None
    assert found["processor"]["instructions"] is None
    assert "GiB" in found["memory"]["free disk space"]


def test_the_compiler_is_the_one_that_cxx_names(monkeypatch, tmp_path):
    script = tmp_path / "my-compiler"
    script.write_text("#!/bin/sh\necho mine 1.0\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", "my-compiler -O2")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert collect_facts()["software"]["compiler"] == "my-compiler: mine 1.0"


def test_a_broken_torch_is_reported_as_a_fact(monkeypatch):
    def fail():
        raise RuntimeError("driver too old\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert collect_facts()["devices"] == {"GPU": "RuntimeError: driver too old"}
