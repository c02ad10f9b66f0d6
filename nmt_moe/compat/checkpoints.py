"""Read checkpoints with torch's safe loader, and say in one message why one cannot be read."""

import argparse
import collections
import os
import re
import typing
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, models
from fairseq.distributed.utils import _TensorPlaceholder
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from nmt_moe.compat._replace import replace

# Plain holders of values, none of which runs code when it is loaded.
IN_FILES = [argparse.Namespace]
IN_BROADCASTS = [
    DictConfig,
    ListConfig,
    Metadata,
    ContainerMetadata,
    AnyNode,
    typing.Any,
    _TensorPlaceholder,
    dict,
    list,
    int,
    collections.defaultdict,
]


def allow_checkpoint_types() -> None:
    """Allow the types of fairseq's checkpoints in torch's safe loader.

    Reason: since torch 2.6, `torch.load` refuses all types it does not know, so that fairseq could
    not read its own checkpoints: models without a dataclass store an `argparse.Namespace`, and when
    several processes resume, rank 0 sends the others the configuration through the same loader.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([*IN_FILES, *IN_BROADCASTS])


def keep_numpy_out_of_checkpoints() -> None:
    """Save metrics as plain numbers and lists.

    Reason: --eval-bleu counts in numpy arrays, which fairseq saves as they are, and torch's safe
    loader refuses: such a training could neither go on nor translate.
    """
    replace(metrics, "state_dict", _plainly)


def _plainly(make_state: Callable) -> Callable:
    def state_dict() -> Any:
        return to_plain(make_state())

    return state_dict


def to_plain(value: Any) -> Any:
    """Turn numpy's arrays and numbers within a nest of containers into Python's own."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return type(value)((key, to_plain(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(to_plain(item) for item in value)
    return value


def copy_checkpoints_whole() -> None:
    """Let the copy of a checkpoint take its name once it is whole.

    Reason: fairseq writes one file so, but copies it to `checkpoint_last.pt` and others in place,
    and a process that is killed meanwhile leaves half of it, and nothing to go on from.
    """
    replace(PathManager, "copy", _copying)


def _copying(copy: Callable) -> Callable:
    def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite or not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite)
        unfinished = f"{dst_path}.tmp"
        if os.path.lexists(unfinished):  # what a stopped copy left, or a link to another file
            os.remove(unfinished)
        is_copied = copy(src_path, unfinished, overwrite=True)
        PathManager.rename(unfinished, dst_path)
        return is_copied

    return copy_whole


def explain_unreadable_checkpoints() -> None:
    """Name the file, and the way out, when a checkpoint is damaged or does not fit.

    Reason: a truncated file ends in one of six exceptions of torch or pickle, and none names it;
    changed bytes among the weights are not noticed at all.
    """
    replace(checkpoint_utils, "load_checkpoint_to_cpu", _reading)
    replace(checkpoint_utils, "load_model_ensemble_and_task", _fitting)
    replace(models, "build_model", _building)


def _reading(load: Callable) -> Callable:
    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            check_digests(path)
            state = load(path, *args, **kwargs)
        except Exception as error:
            # Of all these exceptions only those of the file system name the file themselves.
            if isinstance(error, OSError) and error.filename is not None:
                raise
            raise ValueError(describe_unreadable(path, error)) from error
        return state

    return load_checkpoint_to_cpu


def check_digests(path: str) -> None:
    """Compare a checkpoint's parts with the digests that torch stored beside them.

    torch itself does not, and would load damaged weights without a word.

    Raises:
        ValueError: a part is damaged.
    """
    if not zipfile.is_zipfile(path):  # the form of checkpoints before torch 1.6 has no digests
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its part {damaged} is damaged")


def describe_unreadable(path: str, error: Exception) -> str:
    """Say why the checkpoint at `path` could not be read, and what to do."""
    found = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
    if found:
        return (
            f"the checkpoint `{path}` holds a Python object of type `{found[1]}`, which is not "
            "loaded, because unpickling it could run code. This plugin's checkpoints hold no such "
            "object: take another file, or save it again without that object."
        )
    reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    return (
        f"`{path}` ({os.path.getsize(path)} bytes) is not a whole fairseq checkpoint: it is "
        f"truncated, corrupted or another kind of file ({reason}). "
        "Copy it again, or name another checkpoint of its folder."
    )


def _fitting(load: Callable) -> Callable:
    def load_model_ensemble_and_task(filenames: list[str], *args: Any, **kwargs: Any) -> Any:
        try:
            return load(filenames, *args, **kwargs)
        except RuntimeError as error:
            message = describe_misfit(filenames, error)
            if message is None:
                raise
            raise ValueError(message) from error

    return load_model_ensemble_and_task


def describe_misfit(filenames: list[str], error: Exception) -> str | None:
    """Say why the parameters that were read fit no model; None if the reason is another."""
    files = ", ".join(f"`{name}`" for name in filenames)
    text = str(error)
    if "loading state_dict" in text:
        sizes = re.findall(r"size mismatch for ([^:]+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", text)
        different = [f"{name} is ({old}), not ({new})" for name, old, new in sizes[:3]]
        reason = "; ".join(different) or text.splitlines()[-1].strip()
        return (
            f"the checkpoint {files} does not fit the model that was built for it ({reason}). "
            "If embeddings differ, the data folder has other dictionaries than that of training."
        )
    return None


def _building(build: Callable) -> Callable:
    def build_model(cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
        name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
        known = {*models.ARCH_MODEL_REGISTRY, *models.MODEL_DATACLASS_REGISTRY}
        # fairseq itself fails at wording its message: "KeyError: '_name'".
        if name and name not in known:
            raise ValueError(
                f"neither fairseq nor this plugin knows the model `{name}`. "
                "Add the --user-dir of the plugin that it was trained with."
            )
        return build(cfg, task, from_checkpoint)

    return build_model
