"""The sparsely-gated mixture-of-experts layer of Shazeer et al. 2017; needs torch alone."""

from nmt_moe.moe.config import GATES, MoEConfig
from nmt_moe.moe.dispatch import DispatchPlan, plan_dispatch
from nmt_moe.moe.experts import Experts
from nmt_moe.moe.gate import NoisyTopKGate
from nmt_moe.moe.layer import MoELayer
from nmt_moe.moe.losses import importance_loss, load_loss, squared_cv
from nmt_moe.moe.stats import MoEStats, balance_metrics

__all__ = [
    "GATES",
    "DispatchPlan",
    "Experts",
    "MoEConfig",
    "MoELayer",
    "MoEStats",
    "NoisyTopKGate",
    "balance_metrics",
    "importance_loss",
    "load_loss",
    "plan_dispatch",
    "squared_cv",
]
