"""The gate's probabilities, compared with frequencies over many draws of the noise."""

import torch

from nmt_moe.moe import NoisyTopKGate


def test_load_is_the_frequency_over_redraws_of_each_experts_own_noise():
    torch.manual_seed(3)
    gate = NoisyTopKGate(4, num_experts=5, top_k=2).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 4, dtype=torch.float64)
    noise = torch.randn(1, 5, dtype=torch.float64)
    load = gate(x, noise).load  # the load of one token is P(x, i)
    redraws = 10_000
    for expert in range(5):
        many = noise.repeat(redraws, 1)
        many[:, expert] = torch.randn(redraws, dtype=torch.float64)
        chosen = gate(x.expand(redraws, -1), many).expert_ids == expert
        frequency = chosen.any(1).double().mean()
        # The tolerance is four standard deviations of a frequency in 10^4 draws.
        torch.testing.assert_close(load[expert], frequency, rtol=0, atol=0.02)


def test_gates_sum_to_one_and_are_sorted():
    gate = NoisyTopKGate(4, num_experts=6, top_k=3)
    out = gate(torch.randn(20, 4))
    torch.testing.assert_close(out.gates.sum(1), torch.ones(20))
    assert (out.gates.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == 3 for row in out.expert_ids.tolist())
    torch.testing.assert_close(out.importance.sum(), torch.tensor(20.0))


def test_the_first_batch_is_balanced_only_by_noise():
    torch.manual_seed(0)
    gate = NoisyTopKGate(8, num_experts=8, top_k=2)
    load = gate(torch.randn(4000, 8)).load
    assert load.max() / load.mean() < 1.05
