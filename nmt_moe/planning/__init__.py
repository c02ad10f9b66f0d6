"""Cost cards and cluster plans, both based on a description of a network's modules."""

from nmt_moe.planning.architectures import (
    VOCABULARY,
    NetworkConfig,
    check_known,
    find_configs,
    find_options,
    make_config,
)
from nmt_moe.planning.batch import Batch
from nmt_moe.planning.cluster import FILLED, Plan, Setup, make_plan
from nmt_moe.planning.cost_card import Card, make_card
from nmt_moe.planning.devices import DEVICES, Device
from nmt_moe.planning.network import describe
from nmt_moe.planning.recorder import Product

__all__ = [
    "DEVICES",
    "FILLED",
    "VOCABULARY",
    "Batch",
    "Card",
    "Device",
    "NetworkConfig",
    "Plan",
    "Product",
    "Setup",
    "check_known",
    "describe",
    "find_configs",
    "find_options",
    "make_card",
    "make_config",
    "make_plan",
]
