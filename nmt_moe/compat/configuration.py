"""Let the configuration in a checkpoint set values, but execute nothing.

fairseq builds models, tasks and criterions from the configuration in a file. It evaluates some
options as Python, opens the files that other options name, and could even start a program.
"""

import argparse
import ast
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq import models, tasks
from fairseq.registry import REGISTRIES

logger = logging.getLogger(__name__)

# fairseq's own classes for text, except those that open files or start programs when built from
# their configuration. Classes of this plugin and of the user's other plugins need no entry.
ALLOWED = {
    "model": {
        "bart",
        "cmlm_transformer",
        "insertion_transformer",
        "iterative_nonautoregressive_transformer",
        "levenshtein_transformer",
        "lightconv",
        "lstm",
        "lstm_lm",
        "multilingual_transformer",
        "nacrf_transformer",
        "nonautoregressive_transformer",
        "transformer",
        "transformer_align",
        "transformer_lm",
    },
    "task": {
        "language_modeling",
        "multilingual_language_modeling",
        "multilingual_translation",
        "translation",
        "translation_lev",
        "translation_multi_simple_epoch",
    },
    "criterion": {
        "adaptive_loss",
        "cross_entropy",
        "label_smoothed_cross_entropy",
        "label_smoothed_cross_entropy_with_alignment",
        "nat_loss",
    },
}
# Keys under which fairseq looks up the class for a group of settings.
NAME_KEYS = {"model": ("_name", "arch"), "task": ("_name", "task")}

# Options that name files, folders, network addresses or programs.
FILE_OPTIONS = {
    "bert_model",
    "bpe_codes",
    "bpe_merges",
    "bpe_vocab",
    "bpe_vocab_file",
    "data",
    "decoder_embed_path",
    "encoder_embed_path",
    "extra_data",
    "fixed_dictionary",
    "gpt2_encoder_json",
    "gpt2_vocab_bpe",
    "lang_dict",
    "lang_to_offline_shard_ratio",
    "load_pretrained_decoder_from",
    "load_pretrained_encoder_from",
    "pretrained_checkpoint",
    "pretrained_decoder",
    "quantization_config_path",
    "sampling_weights_from_file",
    "sentencepiece_model",
    "sentencepiece_model_path",
    "source_dict",
    "target_dict",
    "use_plasma_view",
    "user_dir",
}
DATA_FORMATS = {None, "", "raw", "lazy", "cached", "mmap"}
MAX_SETTINGS = 50_000

# fairseq modules that evaluate options, or lines of data, as Python.
EVALUATING = [
    "fairseq.criterions.ctc",
    "fairseq.data.audio.raw_audio_dataset",
    "fairseq.data.codedataset",
    "fairseq.models.fconv",
    "fairseq.models.fconv_lm",
    "fairseq.models.fconv_self_att",
    "fairseq.models.hubert.hubert",
    "fairseq.models.lightconv_lm",
    "fairseq.models.speech_to_text.s2t_wav_transformer",
    "fairseq.models.transformer_lm",
    "fairseq.models.wav2vec.wav2vec",
    "fairseq.models.wav2vec.wav2vec2",
    "fairseq.optim.adafactor",
    "fairseq.optim.adam",
    "fairseq.optim.adamax",
    "fairseq.optim.cpu_adam",
    "fairseq.optim.fused_lamb",
    "fairseq.utils",
    "fairseq_cli.eval_lm",
    "fairseq_cli.validate",
]
MAX_ITEMS = 10_000


def evaluate_literals_only() -> None:
    """Parse options such as `[(512, 3)] * 20` without evaluating them as Python.

    Reason: fairseq calls `eval` on text from the command line and from the configuration in a
    checkpoint. A file could therefore execute code.
    """
    for name in EVALUATING:
        try:
            module = importlib.import_module(name)
        except ImportError:  # it needs a package that is not installed
            continue
        vars(module)["eval"] = evaluate_literal


def evaluate_literal(text: Any) -> Any:
    """Return the value of a literal, in which `+` and `*` may combine numbers and lists.

    Raises:
        ValueError: if `text` is not such a literal or has too many items. The message names it.
    """
    if not isinstance(text, str):
        raise ValueError(f"an option must be text, but is {text!r}.")
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(
            f"an option must be a literal, such as `[(512, 3)] * 20`, but is {text[:200]!a}."
        ) from None


def _evaluate(node: ast.expr) -> Any:
    if not isinstance(node, ast.BinOp):
        if isinstance(node, ast.List):
            return [_evaluate(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(_evaluate(item) for item in node.elts)
        return ast.literal_eval(node)
    left, right = _evaluate(node.left), _evaluate(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if not isinstance(node.op, ast.Mult):
        raise ValueError
    for one, other in ((left, right), (right, left)):
        if isinstance(one, list | tuple) and len(one) * other > MAX_ITEMS:
            raise ValueError
        if isinstance(one, str):
            raise ValueError
    return left * right


def secure_configuration(path: Path, state: dict[str, Any]) -> None:
    """Reject a checkpoint's configuration if it could execute code; drop the files that it names.

    Args:
        path: Path of the checkpoint.
        state: Contents of the checkpoint, not yet processed by fairseq; changed in place.

    Raises:
        ValueError: if a setting is rejected. The message names the checkpoint and the setting.
    """
    for key in ("cfg", "args"):
        if state.get(key) is not None:
            try:
                _check_plain(state[key])
                _check_names(state[key])
            except ValueError as error:
                raise ValueError(f"the configuration of the checkpoint `{path}` {error}") from None
            _drop_files(path, state[key])


def _check_plain(settings: Any) -> None:
    """Reject values that are not plain, refer to other settings, or set an unsafe data format."""
    if not isinstance(settings, dict | argparse.Namespace):
        raise ValueError(f"is not a table of settings, but a {type(settings).__name__}.")
    for count, (key, value) in enumerate(_settings(settings)):
        if count > MAX_SETTINGS:
            raise ValueError(f"has more than {MAX_SETTINGS} settings.")
        if not isinstance(key, str | int):
            raise ValueError(f"has a setting with the invalid name {key!r:.80}.")
        is_nest = isinstance(value, dict | list | tuple | argparse.Namespace)
        if value is not None and not is_nest and type(value) not in (bool, int, float, str):
            raise ValueError(f"sets `{key}` to a {type(value).__name__}.")
        if isinstance(value, str) and ("${" in value or "\0" in value):
            raise ValueError(
                f"sets `{key}` to {value[:80]!a}, which refers to something outside itself."
            )
        if key == "dataset_impl" and (is_nest or value not in DATA_FORMATS):
            raise ValueError(f"sets `dataset_impl` to {value!r:.80}, which could start programs.")


def _settings(nest: Any) -> Iterator[tuple[Any, Any]]:
    """Yield all nested settings with their names, or with their indices if they are in lists."""
    if isinstance(nest, argparse.Namespace):
        nest = vars(nest)
    for key, value in nest.items() if isinstance(nest, dict) else enumerate(nest):
        yield key, value
        if isinstance(value, dict | list | tuple | argparse.Namespace):
            yield from _settings(value)


def _check_names(settings: Any) -> None:
    """Reject names of models, tasks and other classes that are unknown or could execute code."""
    if isinstance(settings, argparse.Namespace):  # fairseq before 1.0 used one table
        groups = {"model": settings, **dict.fromkeys(("task", *REGISTRIES), settings)}
    else:
        groups = settings
    registries = {
        "model": {**models.MODEL_REGISTRY, **models.ARCH_MODEL_REGISTRY},
        "task": tasks.TASK_REGISTRY,
        **{name: entry["registry"] for name, entry in REGISTRIES.items()},
    }
    for group, registry in registries.items():
        is_flat = isinstance(settings, argparse.Namespace)
        for name in _names(group, groups.get(group), is_flat):
            _check_name(group, name, registry)


def _names(group: str, settings: Any, is_flat: bool) -> list[Any]:
    """Return the names that fairseq may use to look up the class for a group of settings."""
    if settings is None or isinstance(settings, str):
        return [] if settings is None else [settings]
    keys = NAME_KEYS.get(group, ("_name", group))[1 if is_flat else 0 :]
    table = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    if not isinstance(table, dict):
        raise ValueError(f"has {table!r:.80} as its {group}.")
    names = [table[key] for key in keys if table.get(key) is not None]
    if not names and not is_flat and len(table) == 1:
        names = list(table)  # fairseq uses the only key as the name
    return [name for name in names if not isinstance(name, dict)]


def _check_name(group: str, name: Any, registry: dict[str, type]) -> None:
    found = registry.get(name) if isinstance(name, str) else None
    if found is None:
        # fairseq fails while composing its own message: "KeyError: '_name'".
        raise ValueError(
            f"names the {group} `{name!s:.80}`, which neither fairseq nor this plugin knows. Add "
            "the --user-dir of the plugin that was used during training."
        )
    if group not in ALLOWED or not found.__module__.startswith("fairseq."):
        return
    allowed = {registry[known] for known in ALLOWED[group] if known in registry}
    if found not in allowed:
        raise ValueError(
            f"names the {group} `{name}`. It is not loaded, because building it could make fairseq "
            "execute code or open files that other settings name."
        )


def _drop_files(path: Path, settings: Any) -> None:
    """Clear the settings that name files, folders or network addresses."""
    dropped = {}
    for table in _tables(settings):
        for key in FILE_OPTIONS & table.keys():
            if table[key]:
                dropped[key] = table[key]
                table[key] = False if isinstance(table[key], bool) else None
    for group in ("bpe", "tokenizer"):
        of_group = settings.get(group) if isinstance(settings, dict) else None
        if isinstance(of_group, dict) and FILE_OPTIONS & of_group.keys() & dropped.keys():
            settings[group] = None  # it is useless without its file
    if dropped:
        logger.debug("files named in the configuration of %s are not opened: %s", path, dropped)


def _tables(nest: Any) -> Iterator[dict[str, Any]]:
    if isinstance(nest, argparse.Namespace):
        nest = vars(nest)
    if isinstance(nest, dict):
        yield nest
    for value in nest.values() if isinstance(nest, dict) else nest:
        if isinstance(value, dict | list | tuple | argparse.Namespace):
            yield from _tables(value)
