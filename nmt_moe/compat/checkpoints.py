"""Read and write fairseq's checkpoints with this project's reader and writer."""

import argparse
import collections
import logging
import os
import re
import typing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from fairseq import checkpoint_utils, file_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel
from fairseq.trainer import Trainer
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from nmt_moe.checkpoints import copy_whole, read_checkpoint
from nmt_moe.compat._replace import replace
from nmt_moe.compat.configuration import secure_configuration

logger = logging.getLogger(__name__)

UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

# Types that only hold values. Loading them runs no code.
IN_BROADCASTS = [
    argparse.Namespace,
    DictConfig,
    ListConfig,
    Metadata,
    ContainerMetadata,
    AnyNode,
    typing.Any,
    distributed_utils._TensorPlaceholder,
    dict,
    list,
    int,
    collections.defaultdict,
]


def read_checkpoints_safely() -> None:
    """Let all commands read checkpoints with `nmt_moe.checkpoints`.

    Reasons: since torch 2.6, `torch.load` rejects types it does not know, so fairseq cannot read
    its own checkpoints; changed bytes among the weights go unnoticed; and a truncated file causes
    one of six exceptions that do not name the file.
    """
    replace(checkpoint_utils, "load_checkpoint_to_cpu", _reading)
    replace(checkpoint_utils, "load_ema_from_checkpoint", _reading_ema)


def _reading(_: Callable) -> Callable:
    def load_checkpoint_to_cpu(
        path: str, arg_overrides: dict[str, Any] | None = None, load_on_all_ranks: bool = False
    ) -> dict[str, Any]:
        state = read_checkpoint(Path(path))
        secure_configuration(Path(path), state)
        try:
            state = _upgrade(state, arg_overrides or {})
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`{path}` is not a complete fairseq checkpoint: its settings or its training "
                f"state is incomplete ({type(error).__name__}: {error}). Specify another "
                "checkpoint."
            ) from error
        return state

    return load_checkpoint_to_cpu


def _upgrade(state: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Apply overrides, and let fairseq upgrade the format of older versions."""
    if state.get("args") is not None:
        vars(state["args"]).update(overrides)
    if state.get("cfg") is not None:
        state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        overwrite_args_by_name(state["cfg"], overrides)
        _warn_of_unknown_settings(state["cfg"], overrides)
    return checkpoint_utils._upgrade_state_dict(state)


def _warn_of_unknown_settings(cfg: DictConfig, overrides: dict[str, Any]) -> None:
    """Warn about overrides that have no effect, such as misspelt ones."""
    groups = [group for name in cfg for group in [cfg[name]] if isinstance(group, DictConfig)]
    known = {*cfg, "user_dir", *(name for group in groups for name in group)}
    for name in overrides.keys() - known:
        logger.warning("the checkpoint has no setting `%s` to override", name)


def _reading_ema(_: Callable) -> Callable:
    def load_ema_from_checkpoint(fpath: str) -> dict[str, Any]:
        state = read_checkpoint(Path(fpath))
        ema = (state.get("extra_state") or {}).get("ema")
        if not ema:
            raise ValueError(f"`{fpath}` has no averaged weights: train with --store-ema.")
        state["model"] = {
            name: value.float() if value.dtype == torch.float16 else value.clone()
            for name, value in ema.items()
        }
        return state

    return load_ema_from_checkpoint


def ignore_unsafe_loading() -> None:
    """Remove the environment variable that lets torch execute code from files.

    Reason: fairseq does not request torch's safe loader, so the variable would switch it off.
    """
    if os.environ.pop(UNSAFE, None):
        logger.warning("%s is ignored: it would let files execute code", UNSAFE)


def allow_configuration_in_broadcasts() -> None:
    """Let rank 0 send a checkpoint to the other ranks when several processes resume.

    Reason: the other ranks read it with `torch.load`, whose safe loader rejects types in the
    configuration.
    """
    replace(distributed_utils, "broadcast_object", _broadcasting)


def _broadcasting(broadcast: Callable) -> Callable:
    def broadcast_object(*args: Any, **kwargs: Any) -> Any:
        with torch.serialization.safe_globals(IN_BROADCASTS):
            return broadcast(*args, **kwargs)

    return broadcast_object


def keep_numpy_out_of_checkpoints() -> None:
    """Save metrics as plain numbers and lists.

    Reason: --eval-bleu counts in numpy arrays. fairseq saves them unchanged, but torch's safe
    loader rejects them. The checkpoint could then be used neither to resume training nor to
    translate.
    """
    replace(metrics, "state_dict", _plainly)


def _plainly(make_state: Callable) -> Callable:
    def state_dict() -> Any:
        return to_plain(make_state())

    return state_dict


def to_plain(value: Any) -> Any:
    """Convert numpy arrays and numbers in nested containers to Python's own types."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return type(value)((key, to_plain(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(to_plain(item) for item in value)
    return value


def copy_checkpoints_whole() -> None:
    """Copy a checkpoint to a temporary name, and rename it once it is complete.

    Reason: fairseq copies directly to `checkpoint_last.pt` and other final names. If the process is
    killed while copying, the file is incomplete, and training cannot resume from it.
    """
    replace(PathManager, "copy", _copying)


def _copying(copy: Callable) -> Callable:
    def copy_checkpoint(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite or not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite)
        copy_whole(Path(src_path), Path(dst_path))
        return True

    return copy_checkpoint


def explain_misfits() -> None:
    """Explain in one line that a checkpoint belongs to another model, and give advice.

    Reason: fairseq prints a line for each parameter and does not name the file.
    """
    replace(checkpoint_utils, "load_model_ensemble_and_task", _fitting)
    replace(Trainer, "load_checkpoint", _resuming)


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


def _resuming(load: Callable) -> Callable:
    def load_checkpoint(self: Trainer, filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, filename, *args, **kwargs)
        except Exception as error:
            reason = error.__context__
            message = describe_misfit([filename], reason) if reason is not None else None
            if message is None:
                raise
            raise ValueError(
                f"{message} To train a new model, specify another `--save-dir`."
            ) from error

    return load_checkpoint


def describe_misfit(filenames: list[str], error: BaseException) -> str | None:
    """Return why a checkpoint's parameters do not fit the model; None for any other error."""
    files = ", ".join(f"`{name}`" for name in filenames)
    text = str(error)
    if "loading state_dict" in text:
        sizes = re.findall(r"size mismatch for ([^:]+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", text)
        different = [f"{name} is ({old}), not ({new})" for name, old, new in sizes[:3]]
        reason = "; ".join(different) or text.splitlines()[-1].strip()[:300]
        return (
            f"the checkpoint {files} does not fit the model that was built for it ({reason}). "
            "If embeddings differ, the data folder's dictionaries differ from those used in "
            "training."
        )
    return None


def refuse_untied_weights() -> None:
    """Reject a checkpoint with two values for one parameter of the model.

    Reason: the last value loaded would silently replace the other, for example the embeddings of a
    model that was trained without `--share-decoder-input-output-embed`.
    """
    replace(BaseFairseqModel, "load_state_dict", _loading)


def _loading(load: Callable) -> Callable:
    def load_state_dict(
        self: BaseFairseqModel, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        names_of = defaultdict(list)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name in state_dict:
                names_of[id(parameter)].append(name)
        for first, *others in names_of.values():
            for other in others:
                if not torch.equal(state_dict[first], state_dict[other]):
                    raise ValueError(
                        f"the checkpoint has two values for `{first}` and `{other}`, which are one "
                        "parameter in this model. Train or load the model without sharing them, "
                        "as in the checkpoint (without `--share-decoder-input-output-embed` and "
                        "similar options)."
                    )
        return load(self, state_dict, *args, **kwargs)

    return load_state_dict


def name_folders_that_are_not_there() -> None:
    """Report a folder that `from_pretrained` does not find, or a file that was given instead.

    Reason: a missing folder causes a TypeError. A file is unpacked to the paths that it contains,
    and is then deleted.
    """
    replace(file_utils, "load_archive_file", _finding_folder)


def _finding_folder(load: Callable) -> Callable:
    def load_archive_file(archive_file: str) -> Any:
        if urlparse(archive_file).scheme in ("http", "https"):
            return load(archive_file)
        for path in archive_file.split(os.pathsep):
            if not os.path.isdir(path):
                what = "is a file" if os.path.exists(path) else "does not exist"
                raise ValueError(
                    f"`{path}` must be a folder, but {what}. Pass from_pretrained the "
                    "checkpoint's folder, set `checkpoint_file=` to the checkpoint's name in it, "
                    "and set `data_name_or_path=` to the folder of the dictionaries, as a path "
                    "that does not begin with a dot."
                )
        return archive_file

    return load_archive_file
