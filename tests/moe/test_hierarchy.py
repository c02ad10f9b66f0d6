"""Two levels of gates."""

import pytest
import torch

from nmt_moe.moe import MoEConfig, MoELayer


def make(experts=12, groups=3, top_k=2, **options):
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(5, 6, experts, top_k, num_groups=groups, **options)).double()
    for name, parameter in layer.named_parameters():
        if "threshold" not in name:
            torch.nn.init.normal_(parameter)
    return layer


def test_parameters_are_saved_and_shaped_by_level():
    shapes = {name: tuple(p.shape) for name, p in make().gate.state_dict().items()}
    assert shapes == {
        "primary.gate_weight": (5, 3),
        "primary.noise_weight": (5, 3),
        "secondary_gate_weight": (3, 5, 4),
        "secondary_noise_weight": (3, 5, 4),
    }
    strict = make(gate="strictly_balanced")
    assert set(strict.gate.state_dict()) == {
        "primary.gate_weight",
        "primary.threshold",
        "secondary_gate_weight",
        "secondary_threshold",
    }


@pytest.mark.parametrize("gate", ["noisy_top_k", "strictly_balanced"])
def test_saved_gates_are_loaded_under_the_names_used_in_checkpoints(gate):
    saved, layer = make(gate=gate).state_dict(), make(gate=gate)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    layer.load_state_dict(saved)
    loaded = layer.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.items())
    # Optimizer state is saved under its parameter's number, so the order must not change.
    names = [name for name, _ in layer.gate.named_parameters()]
    assert [name.partition(".")[0] for name in names] == ["secondary"] * 2 + ["primary"] * 2


def test_products_of_gates_sum_to_one():
    out = make().gate(torch.randn(20, 5, dtype=torch.float64))
    torch.testing.assert_close(out.gates.sum(1), torch.ones(20, dtype=torch.float64))
    assert all(len({e // 4 for e in row}) == 2 for row in out.expert_ids.tolist())


def test_the_load_sums_to_the_number_of_choices():
    # Each of 4000 tokens chooses 2 experts in each of 2 groups. The smooth estimate has the same
    # expected sum.
    out = make().gate(torch.randn(4000, 5, dtype=torch.float64))
    torch.testing.assert_close(out.load.sum().item(), 16_000.0, rtol=0.02, atol=0)


def test_evaluation_uses_no_noise_and_counts_tokens():
    layer = make().eval()
    x = torch.randn(9, 5, dtype=torch.float64)
    y, stats = layer(x)
    assert torch.equal(y, layer(x)[0])
    assert stats.tokens_per_expert.sum() == 36
    torch.testing.assert_close(stats.load, stats.tokens_per_expert.double())


def test_tokens_keep_their_own_noise_beside_padding():
    layer = make()
    x = torch.randn(6, 5, dtype=torch.float64)
    noise = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    padding = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    y, _ = layer(x, padding, noise)
    alone, _ = layer(x[~padding], noise=(noise[0][~padding], noise[1][~padding]))
    torch.testing.assert_close(y[~padding], alone)
    assert not y[padding].any()


def test_a_gate_runs_in_bfloat16():
    for gate in ("noisy_top_k", "strictly_balanced"):
        layer = make(gate=gate).bfloat16()
        y, stats = layer(torch.randn(9, 5, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert stats.importance.dtype == torch.float32
        (y.float().sum() + stats.balance_loss).backward()
