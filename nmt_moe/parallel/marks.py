"""Marks on the parameters of experts."""

from torch import Tensor

from nmt_moe.parallel.groups import ALONE, ExpertParallelGroup

# fairseq's own name for the group a parameter is trained in: its composite optimizer reads the
# attribute, and the fp32 copies of --fp16 and --bf16 inherit it.
PARAM_GROUP = "experts"


def mark_expert(parameter: Tensor, group: ExpertParallelGroup = ALONE) -> None:
    """Mark a parameter (L, ...) whose last two dimensions are one matrix of an expert.

    A parameter that torch creates again (`copy.deepcopy`, `to_empty` after the meta device) is not
    marked; the module that owns it marks it again.

    Args:
        parameter: Of all experts, or this rank's shard of a parameter (E, ...).
        group: The ranks that share the experts.
    """
    parameter.param_group = PARAM_GROUP  # type: ignore[attr-defined]
    if group.size > 1:
        parameter.expert_group = group  # type: ignore[attr-defined]
        # fairseq's own mark, which its fp32 copies inherit: neither summed over ranks nor part of
        # its gradient norm, and counted separately in its log.
        parameter.expert = True  # type: ignore[attr-defined]


def is_expert(parameter: Tensor) -> bool:
    """Return whether `mark_expert` was called for the parameter, or for the one it copies."""
    return getattr(parameter, "param_group", None) == PARAM_GROUP


def is_shard(parameter: Tensor) -> bool:
    """Return whether a parameter, or the one it copies, has only this rank's experts."""
    return hasattr(parameter, "expert")


def shard_group(parameter: Tensor) -> ExpertParallelGroup | None:
    """Return the group that a parameter is spread over; None if this rank holds all of it."""
    return getattr(parameter, "expert_group", None)
