"""Mark the parameters of experts with attributes."""

from torch import Tensor

from nmt_moe.parallel.groups import ALONE, ExpertParallelGroup

# Value of fairseq's attribute `param_group`. fairseq's composite optimizer reads it, and the fp32
# copies that --fp16 and --bf16 make inherit it.
PARAM_GROUP = "experts"


def mark_expert(parameter: Tensor, group: ExpertParallelGroup = ALONE) -> None:
    """Mark a parameter as containing one matrix per expert in its last two dimensions.

    The mark is lost when torch recreates a parameter, for example in `copy.deepcopy`, or in
    `to_empty` after a module has been built on the meta device. The module that owns the parameter
    must then mark it again.

    Args:
        parameter: (L, ...), this rank's shard of a parameter, (E, ...), or all of it.
        group: The ranks that together hold every expert once.
    """
    parameter.param_group = PARAM_GROUP  # type: ignore[attr-defined]
    if group.size > 1:
        parameter.expert_group = group  # type: ignore[attr-defined]
        # fairseq's own mark, which the fp32 copies inherit. It excludes the parameter from sums
        # over ranks and from the gradient norm, and counts it separately in the log.
        parameter.expert = True  # type: ignore[attr-defined]


def is_expert(parameter: Tensor) -> bool:
    """Return whether a parameter, or the one it was copied from, was marked by `mark_expert`."""
    return getattr(parameter, "param_group", None) == PARAM_GROUP


def is_shard(parameter: Tensor) -> bool:
    """Return whether a parameter, or the one it was copied from, is a shard of the experts."""
    return hasattr(parameter, "expert")


def shard_group(parameter: Tensor) -> ExpertParallelGroup | None:
    """Return the expert-parallel group of a shard; None if this rank holds the whole parameter."""
    return getattr(parameter, "expert_group", None)
