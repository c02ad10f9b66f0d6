"""Save every requested checkpoint completely, and choose the best only by finite metrics."""

import errno
import logging
import math
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics

from nmt_moe.checkpoints import ATTEMPTS, write_whole
from nmt_moe.compat._replace import replace, replace_in_command

logger = logging.getLogger(__name__)


def write_checkpoints_whole() -> None:
    """Rename a checkpoint to its final name once it is complete, and report failures.

    Reason: after a failed write, fairseq appends a second attempt to the partial data and renames
    the file, although it is unreadable.
    """
    replace(checkpoint_utils, "torch_persistent_save", _writing)


def _writing(save: Callable) -> Callable:
    def torch_persistent_save(content: Any, filename: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(filename):
            save(content, filename, async_write)
        else:
            write_whole(Path(filename), content, ATTEMPTS)

    return torch_persistent_save


def try_the_save_folder() -> None:
    """Write and rename a file in the save folder before training starts.

    Reason: fairseq's own test does not name the option, follows links, and overwrites a file named
    `dummy`.
    """
    replace(checkpoint_utils, "verify_checkpoint_directory", _trying)


def _trying(_: Callable) -> Callable:
    def verify_checkpoint_directory(save_dir: str) -> None:
        try:
            os.makedirs(save_dir, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".trial-", dir=save_dir) as trial:
                before, after = Path(trial, "before"), Path(trial, "after")
                before.write_bytes(b"trial")
                before.rename(after)
        except OSError as error:
            reason = error.strerror or os.strerror(error.errno or errno.EIO)
            raise ValueError(
                f"`--save-dir` must be a folder where files can be written and renamed, but "
                f"this failed in `{save_dir}`: {reason}. Specify another folder, or make room."
            ) from error

    return verify_checkpoint_directory


def save_intervals_that_end_an_epoch() -> None:
    """Write the checkpoint of --save-interval-updates even if the update ends an epoch.

    Reason: fairseq relies on the epoch's checkpoint, which --no-epoch-checkpoints and
    --save-interval may omit.
    """
    replace(checkpoint_utils, "save_checkpoint", _saving_intervals)


class _WithinEpoch:
    """An epoch's iterator that does not report the end of the epoch."""

    def __init__(self, epoch_itr: Any) -> None:
        self._epoch_itr = epoch_itr

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoch_itr, name)

    def end_of_epoch(self) -> bool:
        return False


def _saving_intervals(save: Callable) -> Callable:
    def save_checkpoint(cfg: Any, trainer: Any, epoch_itr: Any, val_loss: float | None) -> Any:
        interval = cfg.save_interval_updates
        is_due = interval > 0 and trainer.get_num_updates() % interval == 0
        has_own = not cfg.no_epoch_checkpoints and epoch_itr.epoch % cfg.save_interval == 0
        if is_due and not has_own and epoch_itr.end_of_epoch():
            epoch_itr = _WithinEpoch(epoch_itr)
        return save(cfg, trainer, epoch_itr, val_loss)

    return save_checkpoint


def never_take_nan_for_best() -> None:
    """Ignore a metric that is not finite when choosing the best checkpoint.

    Reason: `min(nan, best)` is NaN, and no later value is better than NaN.
    """
    replace(checkpoint_utils, "save_checkpoint", _saving_finite)
    replace_in_command("train", "should_stop_early", _stopping_early)


def _saving_finite(save: Callable) -> Callable:
    def save_checkpoint(cfg: Any, trainer: Any, epoch_itr: Any, val_loss: float | None) -> Any:
        if val_loss is not None and not math.isfinite(val_loss):
            logger.warning(
                "`%s` is %s in validation: this checkpoint is not the best",
                cfg.best_checkpoint_metric,
                val_loss,
            )
            val_loss = None
        return save(cfg, trainer, epoch_itr, val_loss)

    return save_checkpoint


def _stopping_early(decide: Callable) -> Callable:
    def should_stop_early(cfg: Any, valid_loss: float | None) -> bool:
        if valid_loss is not None and not math.isfinite(valid_loss):
            valid_loss = -math.inf if cfg.checkpoint.maximize_best_checkpoint_metric else math.inf
        return decide(cfg, valid_loss)

    return should_stop_early


def stop_at_the_last_update() -> None:
    """Make no further update once --max-update is reached.

    Reason: fairseq checks only after an update, so every restart adds one more update.
    """
    replace_in_command("train", "train", _training)


def _training(train: Callable) -> Callable:
    def train_epoch(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> tuple[list, bool]:
        most, done = cfg.optimization.max_update, trainer.get_num_updates()
        if most and done >= most:
            logger.info("nothing to train: %d updates are done and --max-update is %d", done, most)
            return [None], True
        return train(cfg, trainer, task, epoch_itr)

    return train_epoch


def name_metrics_that_are_not_computed() -> None:
    """Report, before training, a `--best-checkpoint-metric` that validation does not compute.

    Reason: such a metric causes a KeyError after a whole epoch, and nothing is saved.
    """
    replace_in_command("train", "train", _choosing_metric)


def _choosing_metric(train: Callable) -> Callable:
    checked: weakref.WeakSet = weakref.WeakSet()

    def train_epoch(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> tuple[list, bool]:
        # Every validation computes the loss.
        metric = cfg.checkpoint.best_checkpoint_metric
        if metric != "loss" and not cfg.dataset.disable_validation and trainer not in checked:
            checked.add(trainer)
            check_best_metric(metric, trainer, cfg.dataset.valid_subset.split(",")[0])
        return train(cfg, trainer, task, epoch_itr)

    return train_epoch


def check_best_metric(metric: str, trainer: Any, subset: str) -> None:
    """Check that validation computes a metric, by validating one batch.

    Raises:
        ValueError: if the metric is not computed. The message names all computed metrics.
    """
    with metrics.aggregate(new_root=True) as found:
        batches = trainer.get_valid_iterator(subset).next_epoch_itr(
            shuffle=False, set_dataset_epoch=False
        )
        trainer.valid_step(next(iter(batches)))
    names = [name for name in found if not name.startswith("_")]
    # A batch contains only one language pair.
    pairs = [str(pair) for pair in getattr(trainer.task, "evaluated_pairs", ())]
    for name in list(names):
        pair, _, column = name.partition("_")
        if pair in pairs:
            names += [f"{other}_{column}" for other in pairs]
    if metric not in names:
        raise ValueError(
            f"`--best-checkpoint-metric` must be one of {', '.join(sorted(set(names)))}, but is "
            f"{metric}, which validation does not compute. BLEU needs --eval-bleu."
        )
