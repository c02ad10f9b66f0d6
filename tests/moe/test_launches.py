"""The number of kernels that an MoE layer starts on a device, each of which takes time to start."""

import pytest
import torch

from nmt_moe.kernels import _backend
from nmt_moe.moe import MoEConfig, MoELayer

pytest.importorskip("triton")
from tests.support.launches import count_launches

# An earlier version started 60 kernels in the forward pass and 69 in the backward pass.
MOST_FORWARD, MOST_BACKWARD = 40, 25


def test_a_training_pass_starts_half_as_many_kernels_as_before(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "HOST_DEVICES", frozenset())  # as on a GPU
    layer = MoELayer(MoEConfig(model_dim=16, hidden_dim=32, num_experts=8, top_k=2)).to(device)
    x = torch.randn(64, 16, device=device, requires_grad=True)
    with count_launches() as forward:
        y, stats = layer(x)
        loss = stats.importance_loss, stats.load_loss
    outputs, grads = (y, *loss), (torch.ones_like(y), torch.tensor(1.0), torch.tensor(1.0))
    with count_launches() as backward:
        torch.autograd.backward(outputs, grads)

    counts = [sum(started.values()) for started in (forward, backward)]
    assert {"forward_kernel", "_gather_kernel"} <= set(forward)
    assert "backward_kernel" in backward
    assert counts[0] <= MOST_FORWARD, forward
    assert counts[1] <= MOST_BACKWARD, backward
