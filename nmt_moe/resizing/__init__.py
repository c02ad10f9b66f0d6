"""Change the number of experts in a trained model by pruning, merging or upcycling."""

from nmt_moe.resizing.layers import Layer
from nmt_moe.resizing.merge import merge
from nmt_moe.resizing.models import Checkpoint, StoredBundle, read_model
from nmt_moe.resizing.prune import SCOPES, choose_experts
from nmt_moe.resizing.survey import CRITERIA, Survey, shares, survey
from nmt_moe.resizing.upcycle import upcycle

__all__ = [
    "CRITERIA",
    "SCOPES",
    "Checkpoint",
    "Layer",
    "StoredBundle",
    "Survey",
    "choose_experts",
    "merge",
    "read_model",
    "shares",
    "survey",
    "upcycle",
]
