"""The layer's values and gradients in float64, compared with the paper's equations."""

import copy

import pytest
import torch
from torch import nn

from nmt_moe.moe import MoEConfig, MoELayer
from nmt_moe.parallel import is_expert
from tests.support.dense_moe import dense_forward

SHAPES = [  # (gate, groups, tokens, experts, experts per token, dim, hidden)
    pytest.param("noisy_top_k", 0, 7, 4, 2, 16, 8, id="the-usual-case"),
    pytest.param("noisy_top_k", 0, 13, 7, 3, 5, 11, id="nothing-is-a-power-of-two"),
    pytest.param("noisy_top_k", 0, 6, 5, 1, 4, 6, id="one-expert-a-token"),
    pytest.param("noisy_top_k", 0, 6, 3, 3, 4, 6, id="all-experts"),
    pytest.param("noisy_top_k", 0, 2, 9, 2, 4, 6, id="fewer-tokens-than-experts"),
    pytest.param("noisy_top_k", 0, 5, 1, 1, 4, 6, id="a-single-expert"),
    pytest.param("noisy_top_k", 3, 11, 12, 2, 5, 6, id="groups"),
    pytest.param("noisy_top_k", 4, 3, 8, 1, 5, 6, id="groups-without-tokens"),
    pytest.param("noisy_top_k", 2, 7, 10, 2, 5, 6, id="all-groups"),
    pytest.param("noisy_top_k", 5, 7, 10, 2, 5, 6, id="all-experts-of-a-group"),
    pytest.param("softmax", 0, 7, 5, 2, 4, 6, id="softmax"),
    pytest.param("strictly_balanced", 0, 12, 4, 2, 5, 6, id="strict"),
    pytest.param("strictly_balanced", 0, 11, 7, 3, 5, 6, id="strict-and-m-is-not-an-integer"),
    pytest.param("strictly_balanced", 0, 2, 9, 2, 5, 6, id="strict-with-fewer-tokens-than-experts"),
    pytest.param("strictly_balanced", 0, 5, 3, 3, 5, 6, id="strict-and-all-experts"),
    pytest.param("strictly_balanced", 3, 13, 12, 2, 5, 6, id="strict-groups"),
    pytest.param("strictly_balanced", 4, 3, 12, 1, 5, 6, id="strict-groups-of-few-tokens"),
]


def make_layer(experts, top_k, dim, hidden, **options):
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(dim, hidden, experts, top_k, **options)).double()
    for name, parameter in layer.named_parameters():
        if "threshold" not in name:
            torch.nn.init.normal_(parameter, std=0.7)
    return layer


def draw_noise(gate, groups, tokens, experts):
    if gate != "noisy_top_k":
        return None
    noise = torch.randn(tokens, experts, dtype=torch.float64)
    return (torch.randn(tokens, groups, dtype=torch.float64), noise) if groups else noise


@pytest.mark.parametrize(("gate", "groups", "tokens", "experts", "top_k", "dim", "hidden"), SHAPES)
def test_the_training_pass_follows_the_papers_equations(
    gate, groups, tokens, experts, top_k, dim, hidden
):
    layer = make_layer(
        experts,
        top_k,
        dim,
        hidden,
        gate=gate,
        num_groups=groups,
        importance_weight=0.3,
        load_weight=0.2,
    )
    x = torch.randn(tokens, dim, dtype=torch.float64, requires_grad=True)
    noise = draw_noise(gate, groups, tokens, experts)
    y, stats = layer(x, noise=noise)
    expected = dense_forward(layer, x, noise)
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(stats.importance, expected["importance"])
    torch.testing.assert_close(stats.load, expected["load"].to(stats.load))
    torch.testing.assert_close(stats.balance_loss, expected["balance_loss"])

    grad_y = torch.randn_like(y)
    leaves = {"x": x, **dict(layer.named_parameters())}
    gradients = [
        torch.autograd.grad(
            (out * grad_y).sum() + loss,
            list(leaves.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for out, loss in ((y, stats.balance_loss), (expected["y"], expected["balance_loss"]))
    ]
    for name, ours, theirs in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_evaluation_uses_no_noise():
    layer = make_layer(4, 2, 6, 5).eval()
    x = torch.randn(9, 6, dtype=torch.float64)
    y, stats = layer(x, noise=torch.full((9, 4), 100.0, dtype=torch.float64))
    torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)
    assert stats.load.tolist() == stats.tokens_per_expert.tolist()


def test_gates_start_at_zero_and_equal_logits_go_to_the_lowest_ids():
    layer = MoELayer(MoEConfig(6, 5, 4, 2)).eval()
    assert not layer.gate.gate_weight.any()
    assert not layer.gate.noise_weight.any()
    _, stats = layer(torch.randn(9, 6))
    assert stats.tokens_per_expert.tolist() == [9, 9, 0, 0]


def test_padding_affects_no_expert_loss_or_statistic():
    layer = make_layer(4, 2, 6, 5)
    x = torch.randn(9, 6, dtype=torch.float64)
    noise = torch.randn(9, 4, dtype=torch.float64)
    padding = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    spoiled = x.masked_fill(padding.unsqueeze(1), float("nan"))
    y, stats = layer(spoiled, padding, noise)
    alone, alone_stats = layer(x[~padding], noise=noise[~padding])
    torch.testing.assert_close(y[~padding], alone, rtol=0, atol=0)
    assert not y[padding].any()
    for name in ("importance", "load", "tokens_per_expert", "balance_loss"):
        torch.testing.assert_close(getattr(stats, name), getattr(alone_stats, name))


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_without_tokens_has_zero_gradients(masked):
    layer = make_layer(4, 2, 6, 5)
    x = torch.randn(3 if masked else 0, 6, dtype=torch.float64, requires_grad=True)
    padding = torch.ones(3, dtype=torch.bool) if masked else None
    y, stats = layer(x, padding)
    (y.sum() + stats.balance_loss).backward()
    assert not y.any()
    assert stats.balance_loss == 0
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_repeated_passes_agree_bit_for_bit():
    layer = make_layer(8, 3, 16, 24).float()
    x = torch.randn(200, 16)

    def run():
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        y, stats = layer(leaf)
        (y.square().sum() + stats.balance_loss).backward()
        return [y, leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())]

    first = run()
    layer.zero_grad()
    for one, other in zip(first, run(), strict=True):
        assert torch.equal(one, other)


def test_low_precision_gates_are_computed_in_float32():
    layer = make_layer(4, 2, 6, 5).bfloat16()
    y, stats = layer(torch.randn(9, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert stats.importance.dtype == stats.balance_loss.dtype == torch.float32


def test_autocast_leaves_the_gate_in_float32():
    layer = make_layer(4, 2, 6, 5).float()
    x, noise = torch.randn(9, 6), torch.randn(9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = layer(x, noise=noise)
    plain, plain_stats = layer(x, noise=noise)
    torch.testing.assert_close(stats.load, plain_stats.load, rtol=0, atol=0)
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert torch.isfinite(layer.experts.weight_in.grad).all()


GATES = [
    pytest.param("noisy_top_k", 0, id="noisy"),
    pytest.param("noisy_top_k", 4, id="noisy-groups"),
    pytest.param("strictly_balanced", 0, id="strict"),
    pytest.param("strictly_balanced", 4, id="strict-groups"),
    pytest.param("softmax", 0, id="softmax"),
]
NEGATIVE_NAN = torch.tensor(0xFFC00000 - (1 << 32), dtype=torch.int32).view(torch.float32).item()
NOT_FINITE = [
    pytest.param(float("nan"), id="nan"),
    pytest.param(NEGATIVE_NAN, id="nan-with-a-sign"),  # the result of 0 * inf on x86
    pytest.param(float("inf"), id="inf"),
    pytest.param(float("-inf"), id="minus-inf"),
]


@pytest.mark.parametrize(("gate", "groups"), GATES)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_token_that_is_not_finite_is_named_with_its_layer(gate, groups, is_training, value):
    config = MoEConfig(6, 5, 8, 2, gate=gate, num_groups=groups)
    layer = MoELayer(config, "encoder's MoE layer").train(is_training)
    x = torch.randn(9, 6)
    x[3, 2] = value
    with pytest.raises(FloatingPointError, match="infinities or NaN in .* encoder's MoE layer"):
        layer(x)


@pytest.mark.parametrize(("gate", "groups"), GATES)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("tokens", [9, 1000])  # a few numbers are sorted; many are searched
@pytest.mark.parametrize("value", NOT_FINITE[:2])
def test_a_gate_weight_that_is_not_finite_is_named(gate, groups, is_training, tokens, value):
    config = MoEConfig(6, 5, 8, 2, gate=gate, num_groups=groups)
    layer = MoELayer(config).train(is_training)
    weight = layer.gate.primary.gate_weight if groups else layer.gate.gate_weight
    with torch.no_grad():
        weight[:, 3] = torch.full((6,), value)
    with pytest.raises(FloatingPointError, match="gate weights of the MoE layer"):
        layer(torch.randn(tokens, 6))


@pytest.mark.parametrize("is_training", [True, False])
def test_an_expert_whose_logits_are_minus_infinity_is_not_chosen(is_training):
    layer = MoELayer(MoEConfig(6, 5, 8, 2)).train(is_training)
    with torch.no_grad():
        layer.gate.gate_weight[:, 3] = -torch.inf
    y, stats = layer(torch.rand(9, 6) + 0.1)
    assert y.isfinite().all()
    assert stats.importance[3] == stats.tokens_per_expert[3] == 0
    torch.testing.assert_close(stats.load[3], torch.tensor(0.0))


def test_mismatched_tensors_are_refused():
    layer, x = MoELayer(MoEConfig(6, 5, 4, 2)), torch.randn(9, 6)
    for wrong, message in [
        ((x[:, 1:],), r"`x` must have the shape \(N, D\) = \(any, 6\), but has \(9, 5\)"),
        ((x.view(3, 3, 6),), r"`x` .* but has \(3, 3, 6\). Flatten it: `x.flatten\(0, 1\)`"),
        ((x.double(),), r"`x` must be torch.float32, but is torch.float64. Convert it"),
        ((x.long(),), r"`x` must be torch.float32, but is torch.int64"),
        ((x.to("meta"),), r"`x` must be on cpu, but is on meta. Move it"),
        ((x, torch.zeros(8, dtype=torch.bool)), r"`padding_mask` must have the shape \(N,\)"),
        ((x, torch.zeros(9)), r"`padding_mask` must be torch.bool, but is torch.float32"),
        ((x, None, torch.randn(9, 3)), r"`noise` must have the shape \(N, E\)"),
        ((x, None, torch.ones(9, 4).long()), r"`noise` must be floating-point"),
        ((x, None, torch.ones(9, 4, device="meta")), r"`noise` must be on cpu, but is on meta"),
        ((x, None, (x, x)), r"`noise` must be one tensor, \(N, E\)"),
        ((x, None, [1.0]), r"`noise` must be one tensor, \(N, E\), .*, but is \(list\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(*wrong)


def test_one_expert_may_take_all_tokens():
    layer = make_layer(4, 1, 6, 5, importance_weight=0.0, load_weight=0.0)
    with torch.no_grad():
        layer.gate.gate_weight.zero_()
        layer.gate.noise_weight.fill_(-50.0)
        layer.gate.gate_weight[:, 2] = 50.0
    x = torch.rand(9, 6, dtype=torch.float64) + 0.5
    y, stats = layer(x)
    assert stats.tokens_per_expert.tolist() == [0, 0, 9, 0]
    y.sum().backward()
    for weight in (layer.experts.weight_in, layer.experts.weight_out):
        assert weight.grad[2].any()
        assert not weight.grad[[0, 1, 3]].any()


def test_recomputation_changes_no_bit_and_keeps_the_routing():
    x, runs = torch.randn(200, 16), []
    for recompute in ("never", "always"):
        torch.manual_seed(0)
        layer = MoELayer(MoEConfig(16, 32, 8, 2, recompute=recompute))
        y, stats = layer(x)
        (y.square().mean() + stats.balance_loss).backward()
        runs.append([y, stats.tokens_per_expert, *(p.grad for p in layer.parameters())])
    for kept, recomputed in zip(*runs, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize(
    ("experts", "groups"), [(4096, 0), (131072, 256)], ids=["flat", "hierarchical"]
)
def test_the_papers_largest_numbers_of_experts(experts, groups):
    layer = MoELayer(MoEConfig(8, 4, experts, 2, num_groups=groups))
    x = torch.randn(33, 8, requires_grad=True)
    y, stats = layer(x)
    (y.square().sum() + stats.balance_loss).backward()
    assert stats.tokens_per_expert.sum() == 33 * (4 if groups else 2)
    used = layer.experts.weight_out.grad.flatten(1).any(1)
    assert used.sum() <= (stats.tokens_per_expert > 0).sum()
    assert not used[stats.tokens_per_expert == 0].any()
    assert x.grad.isfinite().all()


def test_noise_of_another_shape_is_refused_in_a_hierarchy():
    layer, x = MoELayer(MoEConfig(6, 5, 8, 2, num_groups=4)), torch.randn(9, 6)
    good = torch.randn(9, 4), torch.randn(9, 8)
    layer(x, noise=good)
    for noise in (good[1], list(good), good[:1], (*good, good[1]), (None, good[1])):
        with pytest.raises(ValueError, match=r"`noise` must be a tuple of two tensors"):
            layer(x, noise=noise)


@pytest.mark.parametrize(("gate", "groups"), GATES)
def test_gradients_of_a_gate_do_not_depend_on_autocast_around_the_backward_pass(gate, groups):
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(6, 5, 8, 2, gate=gate, num_groups=groups))
    for name, weight in layer.gate.named_parameters():
        if "weight" in name:
            torch.nn.init.normal_(weight)
    x, found = torch.randn(9, 6), []
    for is_around in (True, False):
        torch.manual_seed(1)
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, stats = layer(x)
            loss = y.float().square().sum() + stats.balance_loss + stats.importance.square().sum()
            if is_around:
                loss.backward()
        if not is_around:
            loss.backward()
        found.append([weight.grad for weight in layer.gate.parameters()])
    for around, outside in zip(*found, strict=True):
        assert torch.equal(around, outside)


def test_copies_of_a_layer_keep_the_marks_of_experts():
    layer = MoELayer(MoEConfig(6, 5, 4, 2))
    with torch.device("meta"):
        empty = MoELayer(MoEConfig(6, 5, 4, 2))
    for one in (copy.deepcopy(layer), empty.to_empty(device="cpu"), copy.copy(layer).double()):
        experts = [name for name, weight in one.named_parameters() if is_expert(weight)]
        assert experts == ["experts.weight_in", "experts.weight_out"]


@pytest.mark.parametrize("frozen", ["weight_in", "weight_out"])
def test_frozen_experts_change_no_other_gradient(frozen):
    found = []
    for is_frozen in (True, False):
        layer = make_layer(5, 2, 6, 7)
        getattr(layer.experts, frozen).requires_grad_(not is_frozen)
        x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
        y, _ = layer(x)
        y.square().sum().backward()
        weights = {name: weight.grad for name, weight in layer.named_parameters()}
        found.append({**weights, "x": x.grad})
    assert found[0].pop(f"experts.{frozen}") is None
    assert found[1].pop(f"experts.{frozen}") is not None
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("groups", [0, 4])
def test_compiled_layers_give_the_same_results_for_any_number_of_tokens(groups):
    layer = MoELayer(MoEConfig(6, 5, 8, 2, num_groups=groups))
    compiled = torch.compile(layer, backend="eager")
    for tokens in (6, 7):
        x, found = torch.randn(tokens, 6), []
        for call in (layer, compiled):
            torch.manual_seed(0)
            layer.zero_grad()
            y, stats = call(x)
            (y.square().sum() + stats.balance_loss).backward()
            found.append([y, *(weight.grad for weight in layer.parameters())])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def test_a_model_is_compiled_around_its_layer_whatever_the_number_of_tokens():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 6)
            self.moe = MoELayer(MoEConfig(6, 5, 8, 2))

        def forward(self, x):
            y, stats = self.moe(self.before(x).relu())
            return self.after(x + y), stats.balance_loss

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = Block().eval()
    compiled = torch.compile(block, backend="eager")
    for tokens in (6, 7, 9):
        x = torch.randn(tokens, 6)
        torch.testing.assert_close(compiled(x), block(x))
    # The operations before and after the layer are each compiled for 6 tokens and for any number.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1


def test_statistics_show_the_experts_of_each_token():
    layer = make_layer(4, 2, 6, 5)
    x, padding = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 0, 0, 1]).bool()
    _, stats = layer(x, padding)
    assert stats.expert_ids[padding].tolist() == [[4, 4]] * 2  # empty slots
    assert not stats.gates[padding].any()
    torch.testing.assert_close(stats.gates[~padding].sum(1), torch.ones(3).double())
    counts = stats.expert_ids.flatten().bincount(minlength=5)[:4]
    assert torch.equal(counts, stats.tokens_per_expert)


def test_a_layer_shows_its_sizes_and_refuses_a_dict_as_its_config():
    words = "model_dim=6, hidden_dim=5, num_experts=8, top_k=2, gate='noisy_top_k', num_groups=4"
    assert words in repr(MoELayer(MoEConfig(6, 5, 8, 2, num_groups=4)))
    with pytest.raises(ValueError, match="`config` must be a MoEConfig, but is a dict"):
        MoELayer({"model_dim": 6})


def test_each_expert_is_drawn_from_its_own_seed():
    layers = []
    for experts in (1, 6):
        torch.manual_seed(0)
        layers.append(MoELayer(MoEConfig(6, 50, experts, 1)))
    assert torch.equal(layers[0].experts.weight_in[0], layers[1].experts.weight_in[0])
    flat = layers[1].experts.weight_in.detach().flatten(1)
    assert len({tuple(row) for row in flat.tolist()}) == 6
    assert 0.95 < flat.abs().max() * 6**0.5 <= 1  # uniform within 1 / sqrt(D)
