"""Strictly balanced gating: equal shares, and thresholds that learn to reproduce the choices."""

import pytest
import torch

from nmt_moe.moe import (
    MoEConfig,
    MoELayer,
    StrictlyBalancedGate,
    batchwise_mask,
    batchwise_threshold_loss,
)


def test_batchwise_mask_by_hand():
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    # With k = 1, N = 4 and E = 2, each expert takes two tokens.
    expected = [[True, False], [True, False], [False, True], [False, True]]
    assert batchwise_mask(probs, top_k=1).tolist() == expected


def test_threshold_loss_by_hand():
    probs = torch.tensor([[0.9], [0.5], [0.2]])
    mask = torch.tensor([[True], [True], [False]])
    threshold = torch.tensor([0.6], requires_grad=True)
    # The threshold contradicts the mask only for token 1, which adds (0 - 1) * (0.5 - 0.6) = 0.1.
    # Lowering the threshold by d lowers the loss by d.
    loss = batchwise_threshold_loss(probs, threshold, mask)
    torch.testing.assert_close(loss, torch.tensor(0.1))
    loss.backward()
    assert threshold.grad.tolist() == [1.0]


@pytest.mark.parametrize("tokens", [1, 5, 12, 100])
@pytest.mark.parametrize("groups", [0, 3])
def test_every_expert_takes_the_same_number_of_tokens(tokens, groups):
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(6, 4, 12, 2, gate="strictly_balanced", num_groups=groups))
    for name, weight in layer.gate.named_parameters():
        if "weight" in name:
            torch.nn.init.normal_(weight)
    _, stats = layer(torch.randn(tokens, 6))
    share = -(-2 * tokens // 12)
    if groups:  # each expert takes a share of its group's tokens
        share = -(-2 * -(-2 * tokens // 3) // 4)
    assert stats.tokens_per_expert.tolist() == [share] * 12


def test_equal_scores_spread_over_the_batch_so_that_every_token_gets_k_experts():
    gate = StrictlyBalancedGate(model_dim=4, num_experts=6, top_k=2)
    out = gate(torch.randn(12, 4))
    assert (out.expert_ids < 6).sum(1).tolist() == [2] * 12
    torch.testing.assert_close(out.gates, torch.full((12, 2), 0.5))


@pytest.mark.parametrize("training", [True, False])
def test_a_token_that_no_expert_takes_has_zero_output(training):
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(6, 64, 8, 1, gate="strictly_balanced")).double().train(training)
    torch.nn.init.normal_(layer.gate.gate_weight)
    torch.nn.init.constant_(layer.gate.threshold, 0.6)  # evaluation uses the thresholds
    x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    out = layer.gate(x)
    taken = (out.expert_ids < 8).any(1)
    y, _ = layer(x)
    assert 0 < taken.sum() < 40
    assert y.any(1).tolist() == taken.tolist()
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_batch_whose_tokens_get_no_experts_is_accepted():
    layer = MoELayer(MoEConfig(6, 4, 8, 1, gate="strictly_balanced")).eval()
    layer.gate.threshold.data.fill_(1.0)
    y, stats = layer(torch.randn(5, 6))
    assert not y.any()
    assert not stats.tokens_per_expert.any()


def test_trained_thresholds_choose_like_the_batch_on_unseen_tokens():
    torch.manual_seed(0)
    gate = StrictlyBalancedGate(model_dim=8, num_experts=8, top_k=2)
    torch.nn.init.normal_(gate.gate_weight, std=0.5)
    optimizer = torch.optim.Adam([gate.threshold], lr=0.01)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 400)
        optimizer.zero_grad()
        gate(torch.randn(512, 8)).threshold_loss.backward()
        optimizer.step()
    held_out = torch.randn(4096, 8)
    probs = (held_out @ gate.gate_weight).softmax(1)
    by_batch = batchwise_mask(probs, 2)
    by_threshold = probs > gate.threshold
    disagreement = (by_batch != by_threshold).float().mean() / by_batch.float().mean()
    # The observed value is 1.2% of the chosen pairs.
    assert disagreement < 0.03
    counts = by_threshold.sum(0).float()
    assert counts.max() / counts.mean() < 1.1


def test_the_threshold_loss_does_not_train_the_gate():
    gate = StrictlyBalancedGate(4, 4, 1)
    torch.nn.init.normal_(gate.gate_weight)
    gate(torch.randn(20, 4)).threshold_loss.backward()
    assert gate.gate_weight.grad is None
    assert gate.threshold.grad.any()


def test_noise_is_refused_by_a_gate_without_noise():
    for gate in ("softmax", "strictly_balanced"):
        layer = MoELayer(MoEConfig(4, 4, 4, 1, gate=gate))
        with pytest.raises(ValueError, match="`noise` must be None"):
            layer(torch.zeros(3, 4), noise=torch.zeros(3, 4))


def test_each_group_of_rows_is_a_separate_batch():
    torch.manual_seed(0)
    offsets = torch.tensor([0, 7, 7, 20, 21])
    probs = torch.randn(21, 6).softmax(1)
    probs[10:15] = 1 / 6  # ties
    bounds = offsets.tolist()
    apart = [batchwise_mask(probs[a:b], 2) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert torch.equal(batchwise_mask(probs, 2, offsets), torch.cat(apart))


@pytest.mark.parametrize("groups", [0, 2])
def test_a_token_assigned_with_probability_0_gets_a_gate_of_1(groups):
    # Expert 0 has probability 1 for both tokens. Strict balance sends one of them to expert 1,
    # which has probability 0 in float32.
    layer = MoELayer(MoEConfig(2, 4, 2 * max(groups, 1), 1, "strictly_balanced", groups))
    with torch.no_grad():
        for name, weight in layer.gate.named_parameters():
            if "gate_weight" in name:
                weight[..., 0, 0] = 1.0
    x = torch.tensor([[200.0, 0.0], [201.0, 0.0]], requires_grad=True)
    out = layer.gate(x)
    assert out.gates.sum(1).tolist() == [1.0, 1.0]
    y, stats = layer(x)
    (y.sum() + stats.balance_loss).backward()
    assert x.grad.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())
