"""Reject search options that fairseq ignores, or that would end in a traceback."""

import ast
import difflib
import json
import math
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from fairseq.dataclass.configs import GenerationConfig
from fairseq.modules import FairseqDropout
from fairseq.tasks.translation import TranslationTask
from torch import nn

from nmt_moe.checks import check_choice, check_range
from nmt_moe.search import SearchConfig

# Lowest allowed values of fairseq's options.
LEAST = {"beam": 1, "nbest": 1, "min_len": 0, "max_len_a": 0, "max_len_b": 0, "prefix_size": 0}
LEAST |= {"no_repeat_ngram_size": 0, "num_workers": 0, "seed": 0, "num_shards": 1}
LEAST |= {"batch_size": 1, "max_tokens": 1}
FINITE = ("lenpen", "diverse_beam_strength", "lm_weight")
# Values of `--bpe` that change nothing when pieces are joined a second time.
PLAIN_BPE = ("subword_nmt", "fastbpe")
# The piece formats that fairseq can remove from translations.
REMOVABLE = (
    *("sentencepiece", "wordpiece", "letter", "silence", "_EOW", "subword_nmt", "@@ ", "@@"),
    "none",
)
# fairseq-eval-lm adds up the losses of a word's pieces, which it recognises by their ending.
REMOVABLE_OF_LM = ("subword_nmt", "@@ ")


def check_evaluation(args: Any) -> None:
    """Check options that only fairseq-eval-lm has; ignore other commands.

    Raises:
        ValueError: if an option is out of range. The message gives the option, the constraint and
            the value.
    """
    if not hasattr(args, "context_window"):
        return
    block = getattr(args, "tokens_per_sample", None)
    highest = None if block is None else block - 1
    check_range("--context-window", args.context_window, 0, highest)
    if args.path and ":" in args.path and not os.path.exists(args.path):
        raise ValueError(
            f"`--path` must name one checkpoint, but is {args.path}. fairseq-eval-lm does not "
            "accept an ensemble."
        )


def flag(name: str) -> str:
    """Return an option's spelling on the command line."""
    return "--" + name.replace("_", "-")


def check_generation(args: Any) -> None:
    """Check the search options of any namespace, ignoring those it lacks.

    Raises:
        ValueError: if an option is out of range or has no effect. The message gives the option,
            the constraint and the value.
    """

    def read(name: str, default: Any = None) -> Any:
        value = getattr(args, name, None)
        return default if value is None else value

    for name, least in LEAST.items():
        check_range(flag(name), read(name, least), least)
    for name in FINITE:
        if not math.isfinite(read(name, 0.0)):
            raise ValueError(f"`{flag(name)}` must be a finite number, but is {read(name)}.")
    if math.isnan(read("unkpen", 0.0)):
        raise ValueError("`--unkpen` must be a number, but is nan.")
    if not 0.0 < read("temperature", 1.0) < math.inf:
        raise ValueError(f"`--temperature` must be above 0, but is {read('temperature')}.")
    shortest, longest = read("min_len", 1), read("max_len_b", 200)
    if shortest > longest and not read("max_len_a", 0):
        raise ValueError(f"`--min-len` must be at most `--max-len-b` {longest}, but is {shortest}.")
    beam, groups = read("beam", 5), read("diverse_beam_groups", -1)
    if groups > 0 and beam % groups:
        raise ValueError(
            f"`--beam` must be a multiple of `--diverse-beam-groups` {groups}, but is {beam}."
        )
    _check_sampling(args, beam)
    check_overrides(read("model_overrides", "{}"))
    if read("seed", 0) >= 2**32:
        raise ValueError(f"`--seed` must be below 2^32, but is {args.seed}.")


def check_overrides(text: str) -> None:
    """Reject `--model-overrides` that are not a Python dictionary.

    Raises:
        ValueError: if the option is not a dictionary. The message names it and its value.
    """
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            "`--model-overrides` must be a dictionary, such as \"{'dropout': 0.1}\", but is "
            f"{text[:80]!r}."
        )


def _check_sampling(args: Any, beam: int) -> None:
    if not getattr(args, "sampling", None):
        for name in ("sampling_topk", "sampling_topp"):
            if (getattr(args, name, None) or -1) > 0:
                raise ValueError(
                    f"`{flag(name)}` has an effect only with `--sampling`. Add that option, or "
                    "leave this one out."
                )
        if (getattr(args, "nbest", None) or 1) > beam:
            raise ValueError(f"`--nbest` must be at most `--beam` {beam}, but is {args.nbest}.")
        return
    for name, highest in (("sampling_topk", math.inf), ("sampling_topp", 1.0)):
        value = getattr(args, name, None)
        if value not in (None, -1) and not 0 < value <= highest:
            raise ValueError(
                f"`{flag(name)}` must be above 0 and at most {highest}, or -1 for all, but is "
                f"{value}."
            )
    if getattr(args, "nbest", beam) != beam:
        raise ValueError(
            f"`--nbest` must equal `--beam` {beam} with `--sampling`, but is {args.nbest}."
        )


def check_pieces(args: Any) -> None:
    """Reject options that would join pieces twice, or that name an unknown kind of pieces.

    Raises:
        ValueError: if `--remove-bpe` is unknown, or is combined with a `--bpe` that would remove
            all spaces from its result.
    """
    bpe, removed = getattr(args, "bpe", None), getattr(args, "post_process", None)
    if removed is not None:
        is_lm = hasattr(args, "context_window")
        check_choice("--remove-bpe", removed, REMOVABLE_OF_LM if is_lm else REMOVABLE)
    if removed and bpe and bpe not in PLAIN_BPE:
        raise ValueError(
            f"`--remove-bpe {removed}` joins pieces that `--bpe {bpe}` joins again, which removes "
            "all spaces. Leave `--remove-bpe` out: the D- lines contain whole words anyway."
        )


def check_retained_dropout(prepare: Callable) -> Callable:
    """Reject `--retain-dropout` if it has no effect on the model's dropout.

    Reason: fairseq changes only its own dropout modules, which it finds by name, and ignores all
    others.

    Raises:
        ValueError: if the option has no effect. The message names the modules that it can change.
    """

    def prepare_for_inference(model: nn.Module, cfg: Any) -> Any:
        wanted = cfg.generation.retain_dropout_modules
        if cfg.generation.retain_dropout:
            modules = [part for part in model.modules() if isinstance(part, FairseqDropout)]
            names = sorted({part.module_name for part in modules if part.module_name})
            missing = set(wanted or ()) - set(names)
            if not modules or missing:
                raise ValueError(
                    "`--retain-dropout` must name fairseq's own dropout modules in a "
                    f"{type(model).__name__} ({', '.join(names) or 'there are none'}), but asks "
                    f"for {', '.join(sorted(missing)) or 'all'}. Leave it out."
                )
        elif wanted:
            raise ValueError(
                "`--retain-dropout-modules` has an effect only with `--retain-dropout`."
            )
        return prepare(model, cfg)

    return prepare_for_inference


def apply_shards(args: Namespace) -> None:
    """Let fairseq-generate translate one shard of its data; reject shards in other commands.

    Reason: fairseq-generate reads the shard from the options for processes, although it runs in
    only one process.

    Raises:
        ValueError: if the command does not divide its data into shards, or has no such shard.
    """
    count, shard = getattr(args, "num_shards", 1) or 1, getattr(args, "shard_id", 0) or 0
    if (count, shard) == (1, 0):
        return
    check_range("--num-shards", count, 1)
    check_range("--shard-id", shard, 0, count - 1)
    if hasattr(args, "context_window"):  # fairseq-eval-lm reads them itself
        return
    if not hasattr(args, "beam") or hasattr(args, "buffer_size"):
        raise ValueError(
            f"`--num-shards` applies only to fairseq-generate and fairseq-eval-lm, but is {count}. "
            "Leave it out, because this command does not divide its data into shards."
        )
    args.distributed_world_size, args.distributed_rank = count, shard


def check_bleu_options(build: Callable) -> Callable:
    """Check the options of `--eval-bleu` before the model is built.

    Raises:
        ValueError: if the value of an option is wrong. The message names the option and the fault.
    """

    def build_model(task: TranslationTask, *args: Any, **kwargs: Any) -> Any:
        if task.cfg.eval_bleu:
            if task.cfg.eval_bleu_remove_bpe is not None:
                check_choice("--eval-bleu-remove-bpe", task.cfg.eval_bleu_remove_bpe, REMOVABLE)
            read_json("--eval-bleu-detok-args", task.cfg.eval_bleu_detok_args)
            check_types("--eval-bleu-args", read_json("--eval-bleu-args", task.cfg.eval_bleu_args))
        return build(task, *args, **kwargs)

    return build_model


def read_json(option: str, text: str | None) -> dict[str, Any]:
    """Parse an option that is a JSON object."""
    try:
        found = json.loads(text or "")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{option}` must be a JSON object such as '{{\"beam\": 4}}', but is {text!r}: {error}."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"`{option}` must be a JSON object such as '{{\"beam\": 4}}', but is {text!r}."
        )
    return found


def check_types(option: str, values: dict[str, Any]) -> None:
    """Check the names and types of search options."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(GenerationConfig)}
    kinds |= dict.fromkeys(SearchConfig.__dataclass_fields__, float)
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"`{option}`: there is no search option '{name}'.{hint}")
        kind = kinds[name]
        allowed: Any = {int: int, float: (int, float), bool: bool}.get(kind, object)
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind in (int, float)):
            raise ValueError(
                f"`{option}`: '{name}' must be of type {kind.__name__}, but is {value!r}."
            )
