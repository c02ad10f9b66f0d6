"""Which parameters are experts."""

from torch.nn import Parameter

# fairseq's own name for the group a parameter is trained in: its composite optimizer reads the
# attribute, and the fp32 copies of --fp16 and --bf16 inherit it. fairseq's `expert` would be too
# strong a word here: it takes the gradient out of the clipping norm and of the sum over processes,
# which is right only where each process has experts of its own.
GROUP = "experts"


def mark_expert(parameter: Parameter) -> None:
    """Mark a parameter whose last two dimensions are one matrix of an expert.

    A parameter that torch makes anew (`copy.deepcopy`, `to_empty` after the meta device) is not
    marked; the module that owns it marks it again.
    """
    parameter.param_group = GROUP  # type: ignore[attr-defined]


def is_expert(parameter: Parameter) -> bool:
    """Return whether `mark_expert` was called for the parameter."""
    return getattr(parameter, "param_group", None) == GROUP
