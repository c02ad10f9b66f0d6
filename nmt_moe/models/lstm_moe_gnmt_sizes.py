"""The sizes of the translation models, one row each."""

from typing import Any, Dict

from nmt_moe.models import lstm_moe_gnmt as lstm_moe_gnmt  # the model must be registered first
from nmt_moe.models._options import register_sizes

# The small models can be trained on a laptop.
SMALL: Dict[str, Any] = {
    "model_dim": 256,
    "lstm_hidden_dim": 512,
    "num_experts": 8,
    "top_k": 2,
    "hidden_dim": 512,
    "dropout": 0.2,
    "init_range": 0.08,
    "attention_wiring": "parallel",
}
# The dense model needs the same number of operations: a single network replaces each MoE layer and
# processes all tokens.
SMALL_DENSE = {**SMALL, "num_experts": 1, "top_k": 1, "hidden_dim": 1024}

# The paper does not state the number of groups for 512 and 2048 experts. These models use a power
# of two near the square root of the number of experts, as the paper's language models do, so that
# the gates of both levels stay small.
STRICT_GROUPS: Dict[str, Any] = {"gate": "strictly_balanced", "top_k": 2}

# Source: Shazeer et al. 2017, sections 5.3 and 5.4, Appendix E.
PAPER: Dict[str, Dict[str, Any]] = {
    "lstm_gnmt": {"dense": True},
    "lstm_moe_gnmt_512h": {"num_experts": 512, "num_groups": 16, **STRICT_GROUPS},
    "lstm_moe_gnmt_2048h": {"num_experts": 2048, "num_groups": 32, **STRICT_GROUPS},
    "lstm_moe_gnmt_multilingual": {
        "num_experts": 512,
        "top_k": 2,
        "hidden_dim": 8192,
    },
    "lstm_gnmt_multilingual": {"num_experts": 1, "top_k": 1, "hidden_dim": 16384},
}

LAPTOP: Dict[str, Dict[str, Any]] = {
    "lstm_moe_gnmt_small": SMALL,
    "lstm_gnmt_small": SMALL_DENSE,
    # The multilingual model has twice as many experts as the single-pair model, but needs the same
    # number of operations.
    "lstm_moe_gnmt_multilingual_small": {**SMALL, "num_experts": 16},
    "lstm_gnmt_multilingual_small": SMALL_DENSE,
}

register_sizes("lstm_moe_gnmt", {**PAPER, **LAPTOP})
