"""Options that the models share, and their translation to the core's configurations."""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Dict, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import register_model_architecture

from nmt_moe.moe import GATES, RECOMPUTE, MoEConfig
from nmt_moe.parallel import ALONE, ExpertParallelGroup, make_expert_parallel_group

# LSTMs have no longest sentence; fairseq wants a number. What the task allows limits first.
MAX_POSITIONS = 100_000

# Options whose names differ from the core's fields.
OPTION_OF_FIELD = {
    "hidden_dim": "expert_hidden_dim",
    "top_k": "moe_top_k",
    "gate": "moe_gate",
    "num_groups": "moe_groups",
    "importance_weight": "importance_loss_weight",
    "load_weight": "load_loss_weight",
    "recompute": "expert_recompute",
}

GateChoice: Any = ChoiceEnum(GATES)
RecomputeChoice: Any = ChoiceEnum(RECOMPUTE)


@dataclass
class MoEOptions(FairseqDataclass):
    """Options of both models; defaults are those of the paper's single-pair translation."""

    model_dim: int = field(
        default=512, metadata={"help": "width of embeddings and of every layer's output"}
    )
    init_range: float = field(
        default=0.04, metadata={"help": "weights start uniform within this, gates and biases aside"}
    )
    dense: bool = field(default=False, metadata={"help": "leave MoE layers out"})
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "use the decoder's embedding as softmax weights too"}
    )
    num_experts: int = field(default=32, metadata={"help": "experts of an MoE layer"})
    moe_top_k: int = field(default=MoEConfig.top_k, metadata={"help": "experts each token goes to"})
    expert_hidden_dim: int = field(default=2048, metadata={"help": "hidden width of an expert"})
    expert_recompute: RecomputeChoice = field(
        default=MoEConfig.recompute,
        metadata={
            "help": "compute experts' hidden activations again in the backward pass instead of "
            "keeping them; auto: from --expert-hidden-dim 4096 on"
        },
    )
    moe_gate: GateChoice = field(
        default=MoEConfig.gate, metadata={"help": "how tokens choose experts"}
    )
    moe_groups: int = field(
        default=MoEConfig.num_groups,
        metadata={"help": "groups of a hierarchical gate; 0 for a flat one"},
    )
    importance_loss_weight: float = field(
        default=MoEConfig.importance_weight, metadata={"help": "w_importance"}
    )
    load_loss_weight: float = field(default=MoEConfig.load_weight, metadata={"help": "w_load"})
    expert_parallel_size: int = field(
        default=0,
        metadata={
            "help": "processes that share the experts among them; 1: each has all; 0: as many as "
            "divide both the number of processes and that of experts (or --moe-groups)"
        },
    )


def moe_config(options: Any) -> Optional[MoEConfig]:
    """Translate the options, of a dataclass or of what omegaconf made of it, to the core's.

    Returns:
        The sizes of an MoE layer; None if the options leave it out.

    Raises:
        ValueError: naming the field, its rule and its value.
    """
    if options.dense:
        return None
    return MoEConfig(
        model_dim=options.model_dim,
        hidden_dim=options.expert_hidden_dim,
        num_experts=options.num_experts,
        top_k=options.moe_top_k,
        gate=str(options.moe_gate),
        num_groups=options.moe_groups,
        importance_weight=options.importance_loss_weight,
        load_weight=options.load_loss_weight,
        # Checkpoints of 0.1.0 have no such option.
        recompute=str(getattr(options, "expert_recompute", MoEConfig.recompute)),
    )


def expert_parallel_group(options: Any, moe: Optional[MoEConfig]) -> ExpertParallelGroup:
    """Decide which process holds which experts; all processes must call.

    Args:
        options: As of `moe_config`.
        moe: What that made of them.

    Raises:
        ValueError: naming the option, its rule and its value.
    """
    if moe is None:
        return ALONE
    size = getattr(options, "expert_parallel_size", None)  # none in early checkpoints
    with naming_options():
        return make_expert_parallel_group(
            moe.num_experts, moe.num_groups, 1 if size is None else size
        )


@contextmanager
def naming_options() -> Iterator[None]:
    """Reword the core's errors for the command line: `top_k` becomes `--moe-top-k`."""

    def name_option(field_name: re.Match) -> str:
        option = OPTION_OF_FIELD.get(field_name[1], field_name[1])
        return f"`--{option.replace('_', '-')}`"

    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"`(\w+)`", name_option, str(error))) from error


def register_sizes(model: str, architectures: Dict[str, Dict[str, Any]]) -> None:
    """Register architectures of a model, each with the options it sets unless the user does."""

    def setter(sizes: Dict[str, Any]) -> Callable[[Namespace], None]:
        def set_sizes(args: Namespace) -> None:
            for name, value in sizes.items():
                setattr(args, name, getattr(args, name, value))

        return set_sizes

    for name, sizes in architectures.items():
        register_model_architecture(model, name)(setter(sizes))
