import argparse
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import moe_check, moe_gating, moe_layer, moe_layers, moe_limits, moe_peers
from benchmarks.moe_points import GRIDS, Point, parse_shape

TINY = Point(tokens=12, model_dim=8, hidden_dim=12, num_experts=6, top_k=4, num_groups=3)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_run_measures_limits_and_layer_and_its_json_gives_the_same_table(capsys, tmp_path):
    path = tmp_path / "found.json"
    line = ["--shape", "12,8,12,6,4", "--modes", "forward", "fwd+bwd", "--rounds", "2"]
    moe_layer.main([*line, "--threads", "1", "--json", str(path)])
    printed = capsys.readouterr().out
    heading, table, legend, notes = printed.strip().split("\n\n")
    assert heading == "### N=12 D=8 H=12 E=6 K=4 float32: 8 rows per expert"
    head, _, *rows = table.splitlines()
    assert [cells(row)[0] for row in rows] == ["gemm", "bmm", "nmt_moe"]
    found = [dict(zip(cells(head), cells(row), strict=True)) for row in rows]
    assert found[1]["fwd+bwd / bmm"] == "1.00"
    assert all(float(row["forward ms"].rstrip("~")) > 0 for row in found)
    assert found[2]["dropped"] == "0.0%"
    assert "threads: 1" in legend
    assert "nmt_moe: noisy top-k gate" in notes
    (point,) = json.loads(path.read_text())["rows"]
    assert point["processes_stayed"]
    for competitor in point["competitors"]:
        assert {mode: len(rounds) for mode, rounds in competitor["rounds"].items()} == {
            "forward": 2,
            "fwd+bwd": 2,
        }
    moe_layer.main(["--render", str(path)])
    assert capsys.readouterr().out == printed


def test_list_names_every_competitor_and_grid(capsys):
    moe_layer.main(["--list"])
    printed = capsys.readouterr().out
    for name in [*moe_limits.LIMITS, *moe_peers.LAYERS, *GRIDS]:
        assert f"\n{name}" in f"\n{printed}"


def test_own_and_plain_layers_agree_with_their_dense_definition():
    names = ["nmt_moe", "nmt_moe_hierarchical", "torch_loop"]
    table, all_agree = moe_check.check_all(names, "cpu", ["float32", "bfloat16"])
    assert all_agree, table


@pytest.mark.parametrize("name", moe_peers.PEERS)
def test_a_peer_agrees_with_its_dense_definition(name):
    if moe_peers.missing_packages([name]):
        pytest.skip(f"{name} is not installed")
    table, all_agree = moe_check.check_all([name], "cpu", ["float32"])
    assert all_agree, table


def test_the_check_finds_a_layer_that_is_wrong(monkeypatch, capsys):
    class Doubled(moe_layers.OwnLayer):
        def forward(self, x):
            y, loss = super().forward(x)
            return 2 * y, loss

    monkeypatch.setitem(moe_peers.LAYERS, "nmt_moe", Doubled)
    with pytest.raises(SystemExit) as stop:
        moe_layer.main(["--check", "--threads", "1"])
    assert stop.value.code == 1
    rows = [cells(row) for row in capsys.readouterr().out.splitlines() if row.startswith("| nmt")]
    assert [row[-1] for row in rows] == ["DIFFERS", "agrees"]


def test_a_layer_that_raises_fails_the_check(monkeypatch):
    def refuse(*_):
        raise ValueError("no such size\nat all")

    monkeypatch.setattr(moe_check, "compare", refuse)
    table, all_agree = moe_check.check_all(["nmt_moe"], "cpu", ["float32"])
    assert not all_agree
    assert "fails: no such size |" in table


def test_logits_have_a_standard_deviation_of_one_and_noise_weights_are_zero():
    point = Point(tokens=512, model_dim=64, hidden_dim=4, num_experts=16, top_k=4, num_groups=4)
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    for name in ("nmt_moe", "nmt_moe_hierarchical"):
        layer = moe_layers.build_layer(moe_layers.OWN[name], point, "cpu")
        for weight in layer.gate_weights():
            assert 0.8 < (x @ weight).std() < 1.2
        assert all(not weight.any() for weight in layer.noise_weights())
    # All experts differ from each other.
    assert len(torch.unique(layer.moe.experts.weight_in[:, 0, 0])) == 16


def test_dropped_tokens_are_those_that_reach_no_expert():
    class OneForAll(moe_layers.Layer):
        """A layer with a single expert, which computes only the last of its rows."""

        def __init__(self, point, capacity):
            super().__init__(point, capacity)
            self.only = nn.Identity()

        def expert_modules(self):
            return [self.only]

        def forward(self, x):
            padded = x.clone()
            padded[:-1] = 0
            return self.only(padded), None

    layer = OneForAll(TINY, 1.0)
    assert layer.computed_pairs(torch.ones(3, 8)) == 1
    assert moe_layers.Layer(TINY, 1.0).computed_pairs(torch.ones(3, 8)) == 3 * 4


def test_the_limits_do_the_same_number_of_operations_as_the_experts():
    for kind in moe_limits.LIMITS:
        bare = moe_limits.BareProducts(kind, TINY, "cpu")
        for mode, passes in (("forward", 1), ("fwd+bwd", 3)):
            with FlopCounterMode(display=False) as counter:
                bare.run(mode)
            # Each of 48 rows is multiplied by a matrix of 8 x 12 and one of 12 x 8. Each weight
            # counts as two operations, a multiplication and an addition.
            assert counter.get_total_flops() == passes * TINY.flops() == passes * 48 * 8 * 12 * 4


def test_eager_gating_has_the_expected_sums_of_gates_importance_and_load():
    clean, raw_scale = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    gates, importance, load = moe_gating.eager_gating(clean, raw_scale, 2)
    torch.testing.assert_close(gates.sum(1), torch.ones(50))
    torch.testing.assert_close(importance.sum(), torch.tensor(50.0))
    assert load.shape == (7,)
    # The load sums to about 2 per token.
    assert 80 < load.sum() < 120


@pytest.mark.parametrize("name", moe_gating.NAMES)
def test_gating_runs_forward_and_backward(name):
    point = GRIDS["gpu"][0].smaller()
    gating = moe_gating.GatingRun(name, point, "cpu")
    if name == "copy":
        gating.source.fill_(1)
    gating.run("fwd+bwd")
    if name == "copy":
        assert gating.target.equal(torch.ones(3, point.tokens, point.num_experts))
        return
    for logits in gating.logits:
        assert logits.grad.isfinite().all()
        assert logits.grad.any()


def test_unknown_and_absent_peers_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--peers must be .*lucidrains.*megatron"):
        moe_layer.choose_peers(["megatron"])
    monkeypatch.setattr(moe_peers.DeepSpeed, "package", ("no_such_module", "deepspeed"))
    with pytest.raises(SystemExit, match="deepspeed is not installed: pip install deepspeed"):
        moe_layer.choose_peers(["deepspeed"])
    assert "deepspeed" not in moe_layer.choose_peers(["all"])
    assert "left out: deepspeed is not installed: pip install deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", "five or six whole numbers"),
        ("1,2,3,4,x", "five or six whole numbers"),
        ("0,8,8,4,2", "T must be at least 1, but is 0"),
        ("8,8,8,4,5", "`top_k` must be"),
        ("8,8,8,4,2,2", "with groups, k must be a square number, but is 2"),
        ("8,8,8,4,4,3", "`num_experts` must be"),
    ],
)
def test_an_impossible_shape_is_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse_shape(text)


def test_a_shape_is_read():
    assert parse_shape("12,8,12,6,4,3") == TINY
    assert (TINY.config().top_k, TINY.config(hierarchical=True).top_k) == (4, 2)


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        moe_layer.main(["--plot", "steps.png"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no file .*none.json. Make one with --json"):
        moe_layer.main(["--render", str(tmp_path / "none.json")])
