"""The sizes of the paper's language models, one row each."""

from typing import Any, Dict

from nmt_moe.models import lstm_moe_lm as lstm_moe_lm  # the model must be registered first
from nmt_moe.models._options import register_sizes

# Each token uses two of 16 groups, and two experts in each of them.
GROUPS_OF_16: Dict[str, Any] = {"num_groups": 16, "top_k": 2}

# Models for the one-billion-word benchmark. Unless a row says otherwise, a model has a width of
# 512, two LSTMs with 512 cells, experts with 1024 hidden units, k = 4, and a dropout of 0.1.
# Source: Shazeer et al. 2017, Table 7.
TABLE_7: Dict[str, Dict[str, Any]] = {
    "lstm_lm_2048_512": {"dense": True, "lstm_layers": 1, "lstm_hidden_dim": 2048},
    "lstm_lm_4x512": {"dense": True, "lstm_layers": 4},
    "lstm_moe_lm_1_wide": {"num_experts": 1, "top_k": 1, "hidden_dim": 4096},
    "lstm_moe_lm_1_deep": {"num_experts": 1, "top_k": 1, "expert_layers": 4},
    "lstm_moe_lm_4": {"num_experts": 4},
    "lstm_moe_lm_32": {"num_experts": 32},
    "lstm_moe_lm_256": {"num_experts": 256},
    "lstm_moe_lm_256h": {"num_experts": 256, **GROUPS_OF_16},
    "lstm_moe_lm_1024h": {"num_experts": 1024, **GROUPS_OF_16, "dropout": 0.2},
    "lstm_moe_lm_4096h": {"num_experts": 4096, **GROUPS_OF_16, "dropout": 0.2},
    "lstm_moe_lm_34m": {
        "model_dim": 1024,
        "lstm_hidden_dim": 1024,
        "num_experts": 1024,
        "hidden_dim": 2048,
        **GROUPS_OF_16,
        "dropout": 0.3,
    },
    "lstm_moe_lm_143m": {
        "model_dim": 1024,
        "lstm_hidden_dim": 4096,
        "num_experts": 256,
        "hidden_dim": 8192,
        **GROUPS_OF_16,
        "dropout": 0.4,
    },
}

# Models for 100 billion words. The table does not state the dropout; its 4xLSTM-512 is
# `lstm_lm_4x512`.
# Source: Shazeer et al. 2017, Table 8.
TABLE_8: Dict[str, Dict[str, Any]] = {
    "lstm_moe_lm_100b_32": {"num_experts": 32},
    **{
        f"lstm_moe_lm_100b_{experts}h": {
            "num_experts": experts,
            "num_groups": groups,
            "top_k": 2,
        }
        for experts, groups in [
            (256, 32),
            (1024, 32),
            (4096, 64),
            (16384, 128),
            (65536, 256),
            (131072, 256),
        ]
    },
}

register_sizes("lstm_moe_lm", {**TABLE_7, **TABLE_8})
