"""Attributes that mark the parameters of experts."""

from torch import Tensor

from nmt_moe.parallel.groups import ALONE, ExpertParallelGroup

# The attribute `param_group` is fairseq's: its composite optimizer reads it, and the fp32 copies of
# --fp16 and --bf16 inherit it.
PARAM_GROUP = "experts"


def mark_expert(parameter: Tensor, group: ExpertParallelGroup = ALONE) -> None:
    """Mark a parameter (L, ...) whose last two dimensions are one matrix of an expert.

    When torch recreates a parameter (`copy.deepcopy`, `to_empty` after the meta device), the mark
    is lost; the module that owns it must mark it again.

    Args:
        parameter: A parameter of all experts, or this rank's shard of a parameter (E, ...).
        group: The ranks that share the experts.
    """
    parameter.param_group = PARAM_GROUP  # type: ignore[attr-defined]
    if group.size > 1:
        parameter.expert_group = group  # type: ignore[attr-defined]
        # fairseq's own mark, which its fp32 copies inherit: it excludes the parameter from sums
        # over ranks and from the gradient norm, and counts it separately in the log.
        parameter.expert = True  # type: ignore[attr-defined]


def is_expert(parameter: Tensor) -> bool:
    """Return whether `mark_expert` was called for a parameter, or for the one it is a copy of."""
    return getattr(parameter, "param_group", None) == PARAM_GROUP


def is_shard(parameter: Tensor) -> bool:
    """Return whether a parameter, or the one it is a copy of, holds only this rank's experts."""
    return hasattr(parameter, "expert")


def shard_group(parameter: Tensor) -> ExpertParallelGroup | None:
    """Return the group that a parameter is spread over; None if this rank holds all of it."""
    return getattr(parameter, "expert_group", None)
