"""The effective number of experts, worked out by hand."""

import torch

from nmt_moe.moe import effective_experts


def test_equally_used_experts_are_counted_and_unused_ones_are_not():
    counts = torch.tensor([[5.0, 5.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(effective_experts(counts), torch.tensor([2.0, 4.0, 1.0]))


def test_uneven_use_by_hand():
    # The shares are 1/2, 1/4 and 1/4, so the entropy is 1.5 bits, and 2^1.5 = 2.828.
    counts = torch.tensor([2.0, 1.0, 1.0])
    torch.testing.assert_close(effective_experts(counts), torch.tensor(2.0**1.5))


def test_no_token_uses_no_expert():
    assert effective_experts(torch.zeros(3)) == 0
