"""A layer that keeps some experts gives the same results as the full layer without the others."""

import math
from dataclasses import replace

import pytest
import torch

from nmt_moe.inference.storing import store
from nmt_moe.moe import MoEConfig, MoELayer
from nmt_moe.resizing import Layer

FLAT = MoEConfig(model_dim=8, hidden_dim=6, num_experts=8, top_k=2)
GROUPS = replace(FLAT, num_groups=2)
KEPT = [1, 2, 6, 7]


def make_layer(config: MoEConfig) -> tuple[MoELayer, Layer]:
    torch.manual_seed(1)
    module = MoELayer(config).double().eval()
    for parameter in module.parameters():
        parameter.data.normal_()
    return module, as_layer(module)


def as_layer(module: MoELayer) -> Layer:
    state = module.state_dict()
    parts = {"gate": {}, "experts": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value.clone()
    return Layer(module.config, parts["gate"], parts["experts"])


def as_module(layer: Layer) -> MoELayer:
    module = MoELayer(layer.moe).double().eval()
    state = {f"gate.{name}": value for name, value in layer.gate.items()}
    state |= {f"experts.{name}": value for name, value in layer.experts.items()}
    module.load_state_dict(state)
    return module


def expert_output(module: MoELayer, expert: int, x: torch.Tensor) -> torch.Tensor:
    return (x @ module.experts.weight_in[expert]).relu() @ module.experts.weight_out[expert]


def choose(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return dense gates, which are by definition the softmax over the largest logits."""
    kept = logits >= logits.sort(dim=1, descending=True).values[:, top_k - 1 : top_k]
    return logits.masked_fill(~kept, -math.inf).softmax(dim=1)


def test_tokens_choose_among_the_remaining_experts():
    module, layer = make_layer(FLAT)
    x = torch.randn(20, 8, dtype=torch.float64)
    logits = x @ module.gate.gate_weight
    gone = [expert for expert in range(8) if expert not in KEPT]
    logits[:, gone] = -math.inf
    gates = choose(logits, 2)
    expected = sum(gates[:, e : e + 1] * expert_output(module, e, x) for e in KEPT)
    torch.testing.assert_close(as_module(layer.take(KEPT))(x)[0], expected)


def test_groups_keep_their_experts():
    module, layer = make_layer(GROUPS)
    x = torch.randn(20, 8, dtype=torch.float64)
    primary = choose(x @ module.gate.primary.gate_weight, 2)
    expected = torch.zeros_like(x)
    for group in range(2):
        logits = x @ module.gate.secondary.gate_weight[group]
        gone = [e - 4 * group for e in range(4 * group, 4 * group + 4) if e not in KEPT]
        logits[:, gone] = -math.inf
        gates = primary[:, group : group + 1] * choose(logits, 2)
        for local in range(4):
            expert = 4 * group + local
            expected += gates[:, local : local + 1] * expert_output(module, expert, x)
    torch.testing.assert_close(as_module(layer.take(KEPT))(x)[0], expected)


@pytest.mark.parametrize("config", [FLAT, GROUPS], ids=["flat", "groups"])
def test_strictly_balanced_gates_keep_their_thresholds(config):
    _, layer = make_layer(replace(config, gate="strictly_balanced"))
    taken = layer.take(KEPT)
    names = [name for name in layer.gate if name.endswith("threshold")]
    name = "secondary_threshold" if config.num_groups else "threshold"
    assert name in names
    assert taken.gate[name].flatten().tolist() == layer.gate[name].flatten()[KEPT].tolist()
    as_module(taken)  # fails unless `taken` has the parameters of a layer


def test_taking_all_experts_gives_the_same_layer():
    for config in (FLAT, GROUPS, replace(FLAT, gate="softmax")):
        _, layer = make_layer(config)
        taken = layer.take(range(8))
        for name, value in {**layer.gate, **layer.experts}.items():
            assert torch.equal({**taken.gate, **taken.experts}[name], value), name


def test_an_impossible_selection_of_experts_is_refused():
    _, layer = make_layer(GROUPS)
    with pytest.raises(ValueError, match="experts from each group, but contains from 1 to 3"):
        layer.take([0, 1, 2, 4])
    with pytest.raises(ValueError, match="some are repeated"):
        layer.take([0, 0, 4, 5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_experts_of_a_bundle_are_read_and_stored_in_its_format(dtype):
    _, layer = make_layer(FLAT)
    weights = {name: value.float() for name, value in layer.experts.items()}
    stored = {}
    for name, value in weights.items():
        stored |= store(name, value.mT, dtype)
    of_bundle = Layer(FLAT, {}, stored, dtype)
    for found, wanted in zip(of_bundle.float_experts(), weights.values(), strict=True):
        tolerance = {"float32": 0.0, "bfloat16": 0.02, "int8": 0.02}[dtype]
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    again = of_bundle.with_experts(*of_bundle.float_experts()).experts
    assert {n: (v.shape, v.dtype) for n, v in again.items()} == {
        n: (v.shape, v.dtype) for n, v in stored.items()
    }
    assert torch.equal(again["weight_in"], stored["weight_in"])
