"""Losses on several ranks equal those on one rank that has all their tokens."""

import pytest
import torch
from torch import distributed

from nmt_moe.moe import MoEConfig, MoELayer
from nmt_moe.parallel import sum_over_ranks
from tests.support.ranks import run_ranks

CONFIG = MoEConfig(6, 5, 4, 2, importance_weight=0.3, load_weight=0.2)
# Rank r has the tokens from BOUNDS[r] up to BOUNDS[r + 1], so the first rank has none.
BOUNDS = (0, 0, 5, 12)


def make_layer() -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(CONFIG).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def make_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BOUNDS[-1], 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(BOUNDS[-1], 4, generator=generator, dtype=torch.float64)


def balance_gradients(layer: MoELayer, x, noise) -> tuple[float, dict[str, torch.Tensor]]:
    loss = layer(x, noise=noise)[1].balance_loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in layer.gate.named_parameters()}


def run_rank(rank: int) -> tuple[float, dict[str, list]]:
    mine = slice(*BOUNDS[rank : rank + 2])
    x, noise = make_tokens()
    loss, gradients = balance_gradients(make_layer(), x[mine], noise[mine])
    for gradient in gradients.values():  # average over ranks, as in data parallelism
        distributed.all_reduce(gradient)
        gradient.div_(distributed.get_world_size())
    return loss, {name: gradient.tolist() for name, gradient in gradients.items()}


@pytest.mark.timeout(590)
def test_three_ranks_have_the_losses_and_gradients_of_one():
    answers = run_ranks(run_rank, len(BOUNDS) - 1)
    loss, gradients = balance_gradients(make_layer(), *make_tokens())
    for rank_loss, rank_gradients in answers:
        assert rank_loss == pytest.approx(loss, abs=1e-12)
        for name, gradient in gradients.items():
            ours = torch.tensor(rank_gradients[name], dtype=torch.float64)
            torch.testing.assert_close(ours, gradient, atol=1e-12, rtol=1e-9, msg=name)


def test_one_process_keeps_the_tensor():
    values = torch.rand(3)
    assert sum_over_ranks(values) is values
