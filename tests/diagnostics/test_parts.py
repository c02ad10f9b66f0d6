"""The diagnosis finds broken parts, whatever error they raise."""

import json

import pytest
import torch
from click.testing import CliRunner

from nmt_moe import kernels, moe, plugin
from nmt_moe.cli import main
from nmt_moe.diagnostics import parts, try_parts


@pytest.fixture(scope="module")
def here():
    """Return the results of trying all parts on this machine, by name."""
    return {part.name: part for part in try_parts()}


def test_the_parts_that_the_tests_need_work(here):
    for name in ("MoE layer", "int8 and bfloat16", "bundles, translator", "training with fairseq"):
        assert here[name].works is True, here[name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_not_a_fault(here):
    assert here["GPU kernels"].works is None
    assert "no CUDA device" in here["GPU kernels"].note


def test_missing_compiled_loops_are_not_a_fault(monkeypatch):
    monkeypatch.setattr(kernels, "compiled_operators", lambda: None)
    part = _named("CPU loops")
    assert part.works is None
    assert "_cpu.build" in part.note


def test_wrong_products_of_compiled_loops_are_a_fault(monkeypatch):
    monkeypatch.setattr(kernels, "compiled_operators", object)
    product = kernels.PackedLinear.__call__
    monkeypatch.setattr(kernels.PackedLinear, "__call__", lambda self, x: product(self, x) + 0.1)
    part = _named("CPU loops")
    assert part.works is False
    assert "differs from torch's by 1.0e-01" in part.note


def _named(name):
    return next(part for part in try_parts() if part.name == name)


def test_a_layer_with_wrong_outputs_is_broken(monkeypatch):
    forward = moe.MoELayer.forward
    monkeypatch.setattr(
        moe.MoELayer, "forward", lambda self, x: (forward(self, x)[0] * 1.01, forward(self, x)[1])
    )
    part = _named("MoE layer")
    assert part.works is False
    assert "differs from its definition" in part.note


def test_wrong_quantised_products_are_noticed(monkeypatch):
    right = kernels.quantise_rows
    monkeypatch.setattr(kernels, "quantise_rows", lambda w: (right(w)[0], right(w)[1] * 2))
    assert "int8 have a relative error of 1.0" in _named("int8 and bfloat16").note


def test_a_plugin_that_cannot_be_imported_is_broken(monkeypatch):
    def fail():
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(plugin, "register", fail)
    assert _named("training with fairseq").note == "ImportError: undefined symbol: _ZN2at"


def test_a_machine_that_only_translates_needs_no_fairseq(monkeypatch):
    find = parts.find_spec
    monkeypatch.setattr(parts, "find_spec", lambda name: None if name == "fairseq" else find(name))
    part = _named("training with fairseq")
    assert part.works is None
    assert "needed only for training, is not installed: pip install 'nmt-moe[fairseq]'" in part.note


def test_an_extra_that_is_not_installed_is_named_with_its_installation_command(monkeypatch):
    def compare(extras=()):
        return {"matplotlib": (None, "matplotlib: not installed")} if extras else {}

    monkeypatch.setattr(parts, "compare_requirements", compare)
    part = _named("figures")
    assert part.works is None
    assert "matplotlib: not installed: pip install 'nmt-moe[plot]'" in part.note


def test_the_command_prints_text_and_json_and_fails_if_a_part_is_broken(monkeypatch):
    one = parts.Part("MoE layer", True, "fine")
    monkeypatch.setattr("nmt_moe.diagnostics.try_parts", lambda: [one])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "  MoE layer  works: fine\n" in result.stdout
    content = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert content["parts"] == [one.to_dict()]
    assert content["packages"]["torch"] == torch.__version__
    bad = parts.Part("MoE layer", False, "ValueError: no")
    monkeypatch.setattr("nmt_moe.diagnostics.try_parts", lambda: [bad])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "BROKEN: ValueError: no" in result.stdout
    assert "broken: MoE layer" in result.stderr
