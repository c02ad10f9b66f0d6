"""Beam search with GNMT's scores and pruning, independent of the model."""

from nmt_moe.search.beam import BeamConfig, Step, StepState, beam_search
from nmt_moe.search.config import SearchConfig
from nmt_moe.search.finished import Hypothesis
from nmt_moe.search.pruning import best_attainable, mask_tokens, within_margin
from nmt_moe.search.restrictions import Restrictions
from nmt_moe.search.scores import (
    COVERAGE_FLOOR,
    length_penalty,
    log_coverage,
    normalised_score,
)

__all__ = [
    "COVERAGE_FLOOR",
    "BeamConfig",
    "Hypothesis",
    "Restrictions",
    "SearchConfig",
    "Step",
    "StepState",
    "beam_search",
    "best_attainable",
    "length_penalty",
    "log_coverage",
    "mask_tokens",
    "normalised_score",
    "within_margin",
]
