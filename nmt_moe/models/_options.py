"""Options that the models share, and their conversion to the core's configurations."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Dict, Optional, TypeVar

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import register_model_architecture

from nmt_moe.moe import GATES, RECOMPUTE, MoEConfig
from nmt_moe.parallel import ALONE, ExpertParallelGroup, make_expert_parallel_group

# LSTMs have no maximum length, but fairseq needs a number. The task's limit is smaller.
MAX_POSITIONS = 100_000

GateChoice: Any = ChoiceEnum(GATES)
RecomputeChoice: Any = ChoiceEnum(RECOMPUTE)

Config = TypeVar("Config")


@dataclass
class MoEOptions(FairseqDataclass):
    """Options that the models share. The defaults are the paper's values for one language pair.

    An option that is also a field of a core configuration has the same name in both, so that the
    core's errors name the option. Aliases are the options' names in version 0.1.0.
    """

    model_dim: int = field(
        default=512, metadata={"help": "width of embeddings and of every layer's output"}
    )
    init_range: float = field(
        default=0.04,
        metadata={
            "help": "initial weights, except gate weights and biases, are drawn uniformly from "
            "[-init_range, init_range]"
        },
    )
    dense: bool = field(default=False, metadata={"help": "build the network without MoE layers"})
    share_decoder_input_output_embed: bool = field(
        default=False,
        metadata={"help": "use the decoder's embedding as the weights of the softmax layer"},
    )
    num_experts: int = field(default=32, metadata={"help": "number of experts in an MoE layer"})
    top_k: int = field(
        default=MoEConfig.top_k,
        metadata={
            "help": "number of experts per token; with groups, both the number of groups per token "
            "and the number of experts per token in each of those groups",
            "argparse_alias": "--moe-top-k",
        },
    )
    hidden_dim: int = field(
        default=2048,
        metadata={"help": "hidden width of an expert", "argparse_alias": "--expert-hidden-dim"},
    )
    recompute: RecomputeChoice = field(
        default=MoEConfig.recompute,
        metadata={
            "help": "whether to recompute experts' hidden activations in the backward pass instead "
            "of keeping them; auto: only if --hidden-dim is at least 4096",
            "argparse_alias": "--expert-recompute",
        },
    )
    gate: GateChoice = field(
        default=MoEConfig.gate,
        metadata={
            "help": "kind of gate (the function that chooses the experts for a token)",
            "argparse_alias": "--moe-gate",
        },
    )
    num_groups: int = field(
        default=MoEConfig.num_groups,
        metadata={
            "help": "number of groups in a hierarchical gate; 0 for a flat gate",
            "argparse_alias": "--moe-groups",
        },
    )
    importance_weight: float = field(
        default=MoEConfig.importance_weight,
        metadata={
            "help": "weight of the importance loss (eq. 7)",
            "argparse_alias": "--importance-loss-weight",
        },
    )
    load_weight: float = field(
        default=MoEConfig.load_weight,
        metadata={
            "help": "weight of the load loss (eq. 11)",
            "argparse_alias": "--load-loss-weight",
        },
    )
    expert_parallel_size: int = field(
        default=0,
        metadata={
            "help": "number of processes that the experts are divided among; 1: each process has "
            "all experts; 0: the greatest common divisor of the total number of processes and the "
            "number of experts (with groups, of groups)"
        },
    )


def other_default(name: str, default: Any) -> Any:
    """Return a field of `MoEOptions` with a different default."""
    return field(default=default, metadata=MoEOptions.__dataclass_fields__[name].metadata)


def to_core(kind: Callable[..., Config], options: Any, **others: Any) -> Config:
    """Build a core configuration from the options named like its fields, and from `others`.

    Raises:
        ValueError: if a value is not allowed. The message gives the option, the constraint and
            the value.
    """
    names = [f.name for f in fields(kind) if f.name not in others]  # type: ignore[arg-type]
    # Options that did not exist when a checkpoint was written get their defaults.
    values = {name: getattr(options, name) for name in names if hasattr(options, name)}
    plain = {name: str(v) if isinstance(v, Enum) else v for name, v in values.items()}
    return kind(**plain, **others)


def moe_config(options: Any) -> Optional[MoEConfig]:
    """Return the configuration of an MoE layer, or None for a dense network.

    Args:
        options: The options of the model, as a dataclass or an omegaconf container made from one.

    Raises:
        ValueError: if a value is not allowed. The message gives the option, the constraint and
            the value.
    """
    return None if options.dense else to_core(MoEConfig, options)


def expert_parallel_group(
    options: Any, moe: Optional[MoEConfig], other: Optional[MoEConfig] = None
) -> ExpertParallelGroup:
    """Decide which process holds which experts. All processes must call this function.

    Args:
        options: The options of the model, as a dataclass or an omegaconf container made from one.
        moe: Configuration of an MoE layer; None if there is none.
        other: Configuration of a second layer. If its number of experts differs, each process
            holds all experts.

    Raises:
        ValueError: if a value is not allowed. The message gives the option, the constraint and
            the value.
    """
    if moe is None:
        return ALONE
    size = options.expert_parallel_size
    if other is not None and other.num_experts != moe.num_experts:
        if size > 1:
            raise ValueError(
                "`expert_parallel_size` must be 1 if layers have different numbers of experts "
                f"({moe.num_experts} and {other.num_experts}), but is {size}. To spread experts "
                "over processes, prune the layers to the same number of experts."
            )
        size = 1
    return make_expert_parallel_group(moe.num_experts, moe.num_groups, size)


def register_sizes(model: str, architectures: Dict[str, Dict[str, Any]]) -> None:
    """Register architectures of a model, each with values for the options that the user omits."""

    def setter(sizes: Dict[str, Any]) -> Callable[[Namespace], None]:
        def set_sizes(args: Namespace) -> None:
            for name, value in sizes.items():
                setattr(args, name, getattr(args, name, value))

        return set_sizes

    for name, sizes in architectures.items():
        register_model_architecture(model, name)(setter(sizes))
