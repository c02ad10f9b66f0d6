"""The choice of the experts to keep, and the weights after merging and upcycling."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt_moe.moe import MoEConfig
from nmt_moe.resizing import choose_experts, merge, upcycle
from nmt_moe.resizing.comparing import measure_difference
from nmt_moe.resizing.merge import match_units
from tests.resizing.test_layers import FLAT, GROUPS, as_module, expert_output, make_layer

ONE = MoEConfig(model_dim=8, hidden_dim=6, num_experts=1, top_k=1)


def shares_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64) / sum(values)


def test_each_layer_keeps_its_best():
    shares = {"encoder": shares_of(5, 1, 4, 2, 3, 0, 0, 0), "decoder": shares_of(*range(8))}
    kept = choose_experts(shares, {"encoder": FLAT, "decoder": FLAT}, 3)
    assert kept == {"encoder": [0, 2, 4], "decoder": [5, 6, 7]}


def test_groups_keep_equal_numbers():
    shares = {"decoder": shares_of(9, 8, 7, 6, 1, 2, 3, 4)}
    assert choose_experts(shares, {"decoder": GROUPS}, 4) == {"decoder": [0, 1, 6, 7]}


@given(
    st.lists(st.integers(0, 9), min_size=8, max_size=8),
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
    st.integers(2, 6),
)
@settings(max_examples=50, deadline=None)
def test_the_least_used_experts_of_all_layers_are_removed(first, second, keep):
    moe = {"encoder": FLAT, "decoder": replace(FLAT, num_experts=6)}
    shares = {"encoder": shares_of(*first, 1e-9)[:8], "decoder": shares_of(*second, 1e-9)[:6]}
    kept = choose_experts(shares, moe, keep, "model")
    assert sum(map(len, kept.values())) == 2 * keep
    assert min(map(len, kept.values())) >= FLAT.top_k
    # By definition, each layer keeps its best two experts. The best of all others fill the
    # remaining places.
    ranked = {
        name: sorted(range(one.num_experts), key=lambda e, name=name: (-float(shares[name][e]), e))
        for name, one in moe.items()
    }
    wanted = {name: set(order[:2]) for name, order in ranked.items()}
    spare = [(-float(shares[name][e]), name, e) for name in moe for e in ranked[name][2:]]
    for _, name, expert in sorted(spare)[: 2 * keep - 4]:
        wanted[name].add(expert)
    assert kept == {name: sorted(numbers) for name, numbers in wanted.items()}


@pytest.mark.parametrize(
    ("config", "keep", "scope", "words"),
    [
        (FLAT, 1, "layer", "`num_experts` must be from 2 to 8, but is 1"),
        (FLAT, 9, "layer", "`num_experts` must be from 2 to 8, but is 9"),
        (GROUPS, 5, "layer", "must be a multiple of the number of groups, 2, but is 5"),
        (GROUPS, 3, "layer", "from 4 to 8, but is 3"),
        (GROUPS, 4, "model", "`scope` must be 'layer' for hierarchical gates"),
        (FLAT, 4, "all", "`scope` must be one of 'layer', 'model'"),
    ],
)
def test_impossible_numbers_of_experts_are_refused(config, keep, scope, words):
    with pytest.raises(ValueError, match=words):
        choose_experts({"decoder": torch.ones(8) / 8}, {"decoder": config}, keep, scope)


def test_units_are_matched_whatever_their_order():
    module, layer = make_layer(FLAT)
    weight_in, weight_out = layer.float_experts()
    order = torch.randperm(6)
    weight_in[3], weight_out[3] = weight_in[0][:, order], weight_out[0][order]
    found = match_units(weight_in, weight_out, 0, 3)
    assert torch.equal(found[0], weight_in[0])
    assert torch.equal(found[1], weight_out[0])
    x = torch.randn(5, 8, dtype=torch.float64)
    one, two = (match_units(weight_in, weight_out, 0, 5)[i] for i in (0, 1))
    torch.testing.assert_close((x @ one).relu() @ two, expert_output(module, 5, x))


@pytest.mark.parametrize("config", [FLAT, GROUPS], ids=["flat", "groups"])
def test_merged_copies_are_unchanged(config):
    module, layer = make_layer(config)
    name = "secondary_gate_weight" if config.num_groups else "gate_weight"
    columns = layer.gate[name]
    if config.num_groups:
        columns[:, :, 2:] = columns[:, :, :2]
        pairs = {2: 0, 3: 1, 6: 4, 7: 5}
    else:
        columns[:, 4:] = columns[:, :4]
        pairs = {4: 0, 5: 1, 6: 2, 7: 3}
    for copy, of in pairs.items():
        order = torch.randperm(6)
        layer.experts["weight_in"][copy] = layer.experts["weight_in"][of][:, order]
        layer.experts["weight_out"][copy] = layer.experts["weight_out"][of][order]
    kept = sorted(pairs.values())
    merged = merge(layer, kept, torch.rand(8, dtype=torch.float64))
    taken = layer.take(kept)
    for values in ("gate", "experts"):
        for key, value in getattr(taken, values).items():
            if "noise" not in key:
                torch.testing.assert_close(getattr(merged, values)[key], value)


def test_merged_experts_are_weighted_by_their_shares():
    _, layer = make_layer(replace(FLAT, num_experts=3, top_k=1))
    layer.gate["gate_weight"][:, 2] = 2 * layer.gate["gate_weight"][:, 0]
    shares = shares_of(3, 5, 1)
    merged = merge(layer, [0, 1], shares)
    weight_in, weight_out = layer.float_experts()
    other = match_units(weight_in, weight_out, 0, 2)[0]
    expected = 0.75 * weight_in[0] + 0.25 * other
    torch.testing.assert_close(merged.experts["weight_in"][0], expected)
    assert torch.equal(merged.experts["weight_in"][1], weight_in[1])
    torch.testing.assert_close(
        merged.gate["gate_weight"][:, 0], 1.25 * layer.gate["gate_weight"][:, 0]
    )


@pytest.mark.parametrize("gate", ["noisy_top_k", "strictly_balanced", "softmax"])
def test_an_upcycled_layer_gives_the_same_results_as_the_dense_one(gate):
    module, layer = make_layer(replace(ONE, gate=gate))
    changed = upcycle(layer, 6, 2)
    assert changed.moe == replace(layer.moe, num_experts=6, top_k=2)
    x = torch.randn(30, 8, dtype=torch.float64)
    new = as_module(changed)
    if gate != "strictly_balanced":  # in evaluation, that gate may give a token no experts
        torch.testing.assert_close(new(x)[0], module(x)[0], rtol=0, atol=1e-12)
        assert measure_difference(layer, changed) < 1e-12
    # During training, noise affects the choice of experts, but not the result.
    torch.testing.assert_close(new.train()(x)[0], module.train()(x)[0], rtol=0, atol=1e-12)


def test_copies_get_different_gradients():
    _, layer = make_layer(ONE)
    module = as_module(upcycle(layer, 4, 2)).train()
    module(torch.randn(50, 8, dtype=torch.float64))[0].square().sum().backward()
    gradients = module.experts.weight_in.grad
    assert all((gradients[0] - gradients[e]).abs().max() > 1e-3 for e in range(1, 4))


def test_only_a_dense_layer_is_upcycled():
    _, layer = make_layer(FLAT)
    with pytest.raises(ValueError, match="has 8 experts in a layer, but only a single expert"):
        upcycle(layer, 16, 2)
    _, layer = make_layer(ONE)
    with pytest.raises(ValueError, match="`top_k` must be from 1 to 4, but is 5"):
        upcycle(layer, 4, 5)
