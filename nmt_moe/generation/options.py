"""Add GNMT's search to fairseq-generate, fairseq-interactive and every task's generator.

An option reaches the search from the command line in three steps:

1. `fairseq.options.get_generation_parser` imports `--user-dir` before it adds its options, and
   looks up `add_generation_args` only then. Our replacement adds our options for every task.
2. fairseq keeps only the parsed arguments that its dataclasses list. If our options are set, they
   are appended to its list of overrides for Hydra (`override_module_args`), so that they arrive in
   `cfg.generation` beside `beam` and `lenpen`. All other configurations stay unchanged.
3. Tasks pass `cfg.generation` to `FairseqTask.build_generator`. Our replacement reads the options
   and passes our generator as `seq_gen_cls`. It accepts any namespace, so that
   `--eval-bleu-args '{"length_penalty_alpha": 0.2}'` also works. If all options are 0, it calls
   the original with unchanged arguments.

These steps are needed because fairseq has no registry of searches, and the options of a special
task would not be available with other tasks.
"""

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from fairseq import options
from fairseq.dataclass import utils as dataclass_utils
from fairseq.models import BaseFairseqModel
from fairseq.tasks.fairseq_task import FairseqTask
from fairseq.tasks.translation import TranslationTask

from nmt_moe.compat._replace import replace
from nmt_moe.generation.checks import (
    apply_shards,
    check_bleu_options,
    check_evaluation,
    check_generation,
    check_pieces,
    check_retained_dropout,
    flag,
)
from nmt_moe.search import SearchConfig

HELP = {
    "length_penalty_alpha": "divide log P by ((5 + length) / 6)^alpha, instead of --lenpen; "
    "GNMT: 0.2",
    "coverage_penalty_beta": "add beta times the sum over source words of log min(attention "
    "received, 1); GNMT: 0.2",
    "beam_prune": "GNMT's beamsize: prune tokens that score more than X nats below the step's "
    "best, and finished hypotheses more than X nats below the best; GNMT: 3.0",
}
NAMES = [field.name for field in fields(SearchConfig)]
# Other options that choose tokens or lengths: fairseq's name and default.
OTHER_SEARCHES = {
    "sampling": False,
    "diverse_beam_groups": -1,
    "diversity_rate": -1.0,
    "match_source_len": False,
    "score_reference": False,
}


def add_gnmt_search() -> None:
    """Add GNMT's search and its options to fairseq."""
    replace(options, "add_generation_args", _adding_options)
    replace(dataclass_utils, "override_module_args", _keeping_options)
    replace(FairseqTask, "build_generator", _building)
    replace(TranslationTask, "build_model", check_bleu_options)
    replace(BaseFairseqModel, "prepare_for_inference_", check_retained_dropout)


def _adding_options(add: Callable) -> Callable:
    def add_generation_args(parser: ArgumentParser) -> Any:
        group = add(parser)
        for name in NAMES:
            text = f"{HELP[name]}; 0: off (default: 0)"
            group.add_argument(flag(name), type=float, default=0.0, metavar="X", help=text)
        return group

    return add_generation_args


def _keeping_options(make: Callable) -> Callable:
    def override_module_args(args: Namespace) -> tuple[list[str], list[str]]:
        # Reject bad values before any model is read.
        config = read_config(args)
        check_pieces(args)
        check_evaluation(args)
        apply_shards(args)
        overrides, deletes = make(args)
        set_names = [name for name in NAMES if getattr(config, name)]
        # ++ works even if the configuration lacks the name.
        overrides += [f"++generation.{name}={getattr(config, name)!r}" for name in set_names]
        return overrides, deletes

    return override_module_args


def read_config(args: Any) -> SearchConfig:
    """Read the options from a namespace or configuration; missing options are off.

    Raises:
        ValueError: if a value is out of range, or two options cannot be combined.
    """
    config = SearchConfig(**{name: float(getattr(args, name, None) or 0.0) for name in NAMES})
    if config.is_on:
        _check_together(config, args)
    check_generation(args)
    return config


def _check_together(config: SearchConfig, args: Any) -> None:
    on = [name for name in NAMES if getattr(config, name)]
    wanted = flag(on[0])
    for name, unset in OTHER_SEARCHES.items():
        if getattr(args, name, unset) not in (unset, None):
            raise ValueError(
                f"`{wanted}` is for beam search, but `{flag(name)}` is another way to choose or "
                "score translations. Leave one of them out."
            )
    if config.beam_prune and getattr(args, "constraints", None):
        raise ValueError(
            "`--beam-prune` might prune the words that `--constraints` requires. Leave one of "
            "them out; both penalties work with constraints."
        )
    if config.changes_scores:
        if getattr(args, "unnormalized", False):
            raise ValueError(f"`{wanted}` normalises scores: leave `--unnormalized` out.")
        length_exponent = getattr(args, "lenpen", 1.0)
        if length_exponent != 1:
            raise ValueError(
                f"`{wanted}` replaces `--lenpen`, which is {length_exponent}. Leave one out."
            )


def _building(build: Callable) -> Callable:
    def build_generator(
        task: FairseqTask,
        models: Sequence[Any],
        args: Any,
        seq_gen_cls: Any = None,
        extra_gen_cls_kwargs: dict[str, Any] | None = None,
        prefix_allowed_tokens_fn: Callable | None = None,
    ) -> Any:
        config = read_config(args)
        constrains = bool(getattr(args, "constraints", None))
        if config.is_on:
            if seq_gen_cls is not None or prefix_allowed_tokens_fn is not None:
                raise ValueError(
                    f"The task {type(task).__name__} has its own search, so "
                    "`--length-penalty-alpha`, `--coverage-penalty-beta` and `--beam-prune` have "
                    "no effect. Set them to 0."
                )
            if config.coverage_penalty_beta:
                _keep_attention(models)
            if not constrains:
                seq_gen_cls = functools.partial(_generator_class(), search_config=config)
                kind = {"print_alignment": getattr(args, "print_alignment", None)}
                extra_gen_cls_kwargs = {**(extra_gen_cls_kwargs or {}), **kind}
        generator = build(
            task, models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn
        )
        return _rescoring(generator, config) if config.is_on and constrains else generator

    return build_generator


# These classes are imported late, because only commands that search need them.
def _generator_class() -> type:
    from nmt_moe.generation.generator import GNMTGenerator

    return GNMTGenerator


def _rescoring(generator: Any, config: SearchConfig) -> Any:
    from nmt_moe.generation.generator import RescoringGenerator

    return RescoringGenerator(generator, config)


def _keep_attention(models: Sequence[Any]) -> None:
    # Some fairseq decoders (lstm, fconv) return attention only if `--print-alignment` needs it.
    for model in models:
        if hasattr(getattr(model, "decoder", None), "need_attn"):
            model.decoder.need_attn = True
