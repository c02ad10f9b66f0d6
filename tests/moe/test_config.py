"""Configurations that no MoE layer can have are refused."""

import pytest

from nmt_moe.moe import MoEConfig

GOOD = {"model_dim": 8, "hidden_dim": 16, "num_experts": 4, "top_k": 2}


def test_defaults_are_the_papers_for_translation():
    config = MoEConfig(model_dim=512, hidden_dim=2048, num_experts=32)
    assert (config.top_k, config.importance_weight, config.load_weight) == (4, 0.01, 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "`top_k` must be from 1 to 4, but is 5"),
        ({"top_k": 0}, "`top_k` must be from 1 to 4, but is 0"),
        ({"num_experts": 0}, "`num_experts` must be at least 1, but is 0"),
        ({"model_dim": 0}, "`model_dim` must be at least 1"),
        ({"hidden_dim": -1}, "`hidden_dim` must be at least 1"),
        ({"gate": "argmax"}, "`gate` must be one of 'noisy_top_k', .*, but is 'argmax'"),
        ({"num_groups": -1}, "`num_groups` must be from 0 to 4, but is -1"),
        ({"num_groups": 3}, "`num_experts` must be a multiple of `num_groups`, 3, but is 4"),
        ({"num_groups": 4}, "`top_k` must be from 1 to 1, but is 2"),
        ({"num_groups": 2, "gate": "softmax"}, "`num_groups` must be 0 with the gate 'softmax'"),
        ({"top_k": 2.0}, "`top_k` must be a whole number .*, but is 2.0"),
        ({"top_k": True}, "`top_k` must be a whole number .*, but is True"),
        ({"num_experts": "4"}, "`num_experts` must be a whole number .*, but is '4'"),
        ({"hidden_dim": None}, "`hidden_dim` must be a whole number .*, but is None"),
        ({"num_groups": 2.0}, "`num_groups` must be a whole number .*, but is 2.0"),
        ({"importance_weight": -0.1}, "`importance_weight` must be at least 0"),
        ({"load_weight": float("nan")}, "`load_weight` must be at least 0"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{**GOOD, **change})
