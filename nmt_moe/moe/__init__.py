"""The sparsely-gated mixture-of-experts layer of Shazeer et al. 2017. It needs only torch."""

from nmt_moe.moe.config import GATES, RECOMPUTE, MoEConfig
from nmt_moe.moe.experts import Experts
from nmt_moe.moe.gate import (
    NoisyTopKGate,
    SoftmaxGate,
    StrictlyBalancedGate,
    batchwise_mask,
    batchwise_threshold_loss,
)
from nmt_moe.moe.hierarchical_gate import HierarchicalGate
from nmt_moe.moe.layer import MoELayer, build_gate
from nmt_moe.moe.losses import importance_loss, load_loss, squared_cv
from nmt_moe.moe.routing import (
    expert_outputs,
    gate_entropy,
    gate_margin,
    output_similarity,
    routing_saturation,
)
from nmt_moe.moe.stats import MoEStats, balance_metrics, effective_experts

__all__ = [
    "GATES",
    "RECOMPUTE",
    "Experts",
    "HierarchicalGate",
    "MoEConfig",
    "MoELayer",
    "MoEStats",
    "NoisyTopKGate",
    "SoftmaxGate",
    "StrictlyBalancedGate",
    "balance_metrics",
    "batchwise_mask",
    "batchwise_threshold_loss",
    "build_gate",
    "effective_experts",
    "expert_outputs",
    "gate_entropy",
    "gate_margin",
    "importance_loss",
    "load_loss",
    "output_similarity",
    "routing_saturation",
    "squared_cv",
]
