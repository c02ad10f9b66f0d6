"""The numbers of experts in a network's two MoE layers, and numbers that are refused."""

import pytest
import torch
from torch import nn

from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, GNMTDecoder, GNMTEncoder

MOE = MoEConfig(model_dim=8, hidden_dim=4, num_experts=6, top_k=2)


def test_the_decoder_may_have_another_number_of_experts():
    config = GNMTConfig(model_dim=8, lstm_hidden_dim=8, moe=MOE, decoder_num_experts=3)
    embedding = nn.Embedding(5, 8)
    encoder, decoder = GNMTEncoder(config, embedding), GNMTDecoder(config, embedding)
    assert len(encoder.moe.moe.experts.weight_in) == 6
    assert len(decoder.moe.moe.experts.weight_in) == 3
    assert decoder.moe.moe.gate.gate_weight.shape == (8, 3)
    assert len(encoder.moe(torch.randn(4, 2, 8), None)[1].importance) == 6
    assert len(decoder.moe(torch.randn(4, 2, 8), None)[1].importance) == 3


def test_by_default_both_layers_have_the_same_number_of_experts():
    assert GNMTConfig(model_dim=8, lstm_hidden_dim=8, moe=MOE).decoder_moe == MOE
    assert GNMTConfig(model_dim=8, lstm_hidden_dim=8).decoder_moe is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decoder_num_experts": 1}, "`decoder_num_experts` cannot be 1: `top_k`"),
        ({"decoder_num_experts": -1}, "`decoder_num_experts` must be at least 0"),
        ({"decoder_num_experts": 3, "moe": None}, "must be 0 without MoE layers"),
    ],
)
def test_an_impossible_number_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GNMTConfig(**{"model_dim": 8, "lstm_hidden_dim": 8, "moe": MOE, **options})
