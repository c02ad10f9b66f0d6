"""The language model's network: hand-computed results, single steps, and sizes that it refuses."""

import pytest
import torch
from torch import Tensor, nn

from nmt_moe.moe import MoEConfig
from nmt_moe.nn import LSTMLanguageModel, LSTMLMConfig

PAD = 1
MOE = MoEConfig(model_dim=6, hidden_dim=8, num_experts=4, top_k=2)


def build(seed: int = 1, moe: MoEConfig | None = MOE, **sizes: object) -> nn.Module:
    """Build a model in float64 and evaluation mode, without dropout and with uneven gates."""
    torch.manual_seed(seed)
    options = {"model_dim": 6, "lstm_hidden_dim": 10, "init_range": 0.5, "dropout": 0.0, **sizes}
    network = LSTMLanguageModel(LSTMLMConfig(moe=moe, **options), nn.Embedding(12, 6, PAD))
    for name, parameter in network.named_parameters():
        if ".gate." in name:
            nn.init.normal_(parameter)
    return network.double().eval()


def tokens(sentences: int, length: int) -> Tensor:
    return torch.randint(2, 12, (sentences, length), generator=torch.Generator().manual_seed(2))


def test_the_layers_by_hand():
    network = build()
    given = tokens(2, 5)
    x = network.embedding(given.t())
    x = x + network.layers[0](x)[0]
    y, _ = network.moe.moe(x.reshape(10, 6))
    x = x + y.sigmoid().view(5, 2, 6)
    x = x + network.layers[1](x)[0]
    torch.testing.assert_close(network(given).features, x.transpose(0, 1))


def test_the_deep_expert_by_hand():
    moe = MoEConfig(model_dim=6, hidden_dim=8, num_experts=1, top_k=1)
    network = build(moe=moe, expert_layers=3)
    assert [tuple(p.weight.shape) for p in network.moe.products] == [(8, 6), (8, 8), (8, 8), (6, 8)]
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    first, second, third, last = (product.weight.t() for product in network.moe.products)
    wanted = x + ((((x @ first).relu() @ second).relu() @ third).relu() @ last).sigmoid()
    out, stats = network.moe(x, None)
    torch.testing.assert_close(out, wanted)
    assert stats is None
    assert network(tokens(2, 3)).moe_stats is None


def test_one_wide_expert_is_a_dense_network():
    network = build(moe=MoEConfig(model_dim=6, hidden_dim=8, num_experts=1, top_k=1)).train()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    experts = network.moe.moe.experts
    wanted = x + ((x @ experts.weight_in[0]).relu() @ experts.weight_out[0]).sigmoid()
    out, stats = network.moe(x, None)
    torch.testing.assert_close(out, wanted)
    assert stats.balance_loss == 0


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_continuing_from_a_state_equals_all_steps_at_once(moe: MoEConfig | None):
    network = build(moe=moe, lstm_layers=3)
    given = tokens(3, 7)
    whole = network(given)
    first = network(given[:, :4])
    second = network(given[:, 4:], first.state)
    features = torch.cat([first.features, second.features], dim=1)
    torch.testing.assert_close(features, whole.features)
    torch.testing.assert_close(second.state.cell, whole.state.cell)
    assert whole.state.hidden.shape == (3, 3, 6)
    assert whole.state.cell.shape == (3, 3, 10)


def test_no_token_sees_those_after_it():
    network = build()
    given = tokens(2, 6)
    other = given.clone()
    other[:, 4:] = 3
    one, two = network(given).features, network(other).features
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not one[:, 4:].allclose(two[:, 4:])


def test_padding_reaches_no_expert_and_changes_nothing():
    network = build()
    given = tokens(2, 6)
    given[1, 3:] = PAD
    out = network(given, padding_mask=given.eq(PAD))
    alone = network(given[1:, :3])
    torch.testing.assert_close(out.features[1, :3], alone.features[0])
    assert out.moe_stats.tokens_per_expert.sum() == (6 + 3) * 2


def test_dropout_applies_to_the_embedding_and_to_every_layer():
    network = build(dropout=1.0).train()
    given = tokens(2, 5)
    # All outputs are dropped, including those of the embedding, so only zeros remain.
    assert network(given).features.abs().sum() == 0


def test_every_parameter_has_a_gradient():
    network = build().train()
    out = network(tokens(4, 9))
    (out.features.square().sum() + out.moe_stats.balance_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dim": 0}, "`model_dim` must be at least 1, but is 0"),
        ({"lstm_hidden_dim": 511}, "`lstm_hidden_dim` must be at least 512"),
        ({"lstm_layers": 0}, "`lstm_layers` must be at least 1"),
        ({"lstm_layers": 1, "moe": MOE}, "`lstm_layers` must be at least 2"),
        ({"dropout": 1.5}, "`dropout` must be from 0.0 to 1.0"),
        ({"init_range": -1.0}, "`init_range` must be at least 0"),
        ({"expert_layers": 0}, "`expert_layers` must be at least 1"),
        (
            {"expert_layers": 2, "moe": MOE},
            "`expert_layers` must be 1 with 4 experts, but is 2. Set `num_experts` to 1",
        ),
        ({"expert_layers": 2}, "`expert_layers` must be 1 with 0 experts"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LSTMLMConfig(**change)
