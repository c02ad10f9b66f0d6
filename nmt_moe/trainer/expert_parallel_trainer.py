"""The trainer, which may spread a model's experts over several processes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from torch import Tensor, nn

from nmt_moe.checkpoints import (
    EXPERT_NAMES,
    MANIFEST,
    remove_unused_files,
    restore_experts,
    save_experts,
)
from nmt_moe.parallel import is_shard, shard_norm
from nmt_moe.trainer.epoch import check_batches, describe_batches
from nmt_moe.trainer.experts import (
    cut_experts,
    expert_group,
    leave_out_experts,
    moe_layers,
    name_experts,
    own_expert_state,
    own_experts,
)
from nmt_moe.trainer.precision import (
    keeping_loaded,
    master_weights,
    scaler_state,
    set_master_weights,
    set_scaler_state,
)
from nmt_moe.trainer.reading import reading_for_training
from nmt_moe.trainer.save_folder import FolderLock, remove_unfinished_files, warn_of_little_room
from nmt_moe.trainer.settings import check_expert_parallel, check_training
from nmt_moe.trainer.stand_in import StandIn

logger = logging.getLogger(__name__)

# Keys of a checkpoint's extra state.
NUM_PROCESSES = "num_processes"
BATCHES = "train_batches"
SCALER = "loss_scaler"

# Warn if the loss exceeds this many times the first loss, which is about that of random guessing.
MOST_GROWTH = 100


class ExpertParallelTrainer(Trainer):
    """fairseq's trainer, extended to models with experts that are spread over ranks.

    With such a model, fairseq's own trainer would clip gradients by a norm that excludes experts;
    flatten the gradients of experts and other parameters together under --fp16; retry a batch that
    did not fit into memory while other ranks wait; and save only rank 0's experts. With this
    trainer, each rank writes its experts to a file beside the checkpoint. The checkpoint holds
    everything else and the digests of the expert files, and any number of ranks can read it. During
    training, each rank reads only its own experts, so that no rank needs memory for all of them.

    Attributes:
        group: The ranks that together hold every expert once.
    """

    def __init__(
        self, cfg: Any, task: Any, model: nn.Module, criterion: nn.Module, quantizer: Any = None
    ) -> None:
        self.group = expert_group(model)
        check_training(cfg, model, criterion)
        if self.is_spread:
            check_expert_parallel(cfg, self.group.size)
            if cfg.common.fp16 and not cfg.common.fp16_no_flatten_grads:
                logger.info("experts are spread over processes: using --fp16-no-flatten-grads")
                cfg.common.fp16_no_flatten_grads = True
            # Each rank must read its own experts.
            cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        # Otherwise, batches are formed with the random numbers of the first epoch and kept for all
        # later epochs, and a run resumed in epoch 5 trains on different batches from those of an
        # uninterrupted run.
        cfg.dataset.update_epoch_batch_itr = True
        super().__init__(cfg, task, model, criterion, quantizer)
        self._stand_in = StandIn(model, criterion)
        self._manifest: dict[str, Any] | None = None  # of the checkpoint being saved
        self._train_iterator: Any = None
        self._resumed: tuple[int, dict[str, Any]] | None = None  # an epoch and its batches
        self._first_loss: float | None = None
        if self.is_data_parallel_master and not cfg.checkpoint.no_save:
            folder = Path(cfg.checkpoint.save_dir)
            self._lock = FolderLock(folder)
            remove_unfinished_files(folder)
            remove_unused_files(folder)  # left over from a failed save
            warn_of_little_room(folder, model, not cfg.checkpoint.no_save_optimizer_state)

    @property
    def is_spread(self) -> bool:
        """Return whether experts are spread over ranks."""
        return self.group.size > 1

    # Updates

    def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
        sample, stands_in = super()._prepare_sample(sample, is_dummy)
        if is_dummy:  # fairseq's call for the stand-in batch
            return sample, stands_in
        self._stand_in.switch(stands_in)
        # During training, the stand-in batch has no effect anyway. In validation, it is skipped,
        # because validation also counts translations.
        return sample, stands_in and not self.model.training

    def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
        """Make an update. If ranks wait for each other, no batch may be skipped."""
        log = super().train_step(samples, raise_oom or self.is_spread)
        if log and "loss" in log:
            self._warn_of_growing_loss(float(log["loss"]))
        return log

    def _warn_of_growing_loss(self, loss: float) -> None:
        """Warn once if the loss has exploded."""
        if self._first_loss is None:
            self._first_loss = loss
        if loss > MOST_GROWTH * max(self._first_loss, 1.0) and "growth" not in self._warn_once:
            self._warn_once.add("growth")
            logger.warning(
                "the loss was %.3g at first and is %.3g after %d updates: training is "
                "diverging. Lower --lr, raise --warmup-updates or clip with --clip-norm.",
                self._first_loss,
                loss,
                self.get_num_updates(),
            )

    def get_train_iterator(self, epoch: int, *args: Any, **kwargs: Any) -> Any:
        """Return the iterator over an epoch. A resumed epoch must have the same batches."""
        iterator = super().get_train_iterator(epoch, *args, **kwargs)
        if self._resumed is not None and epoch == self._resumed[0]:
            check_batches(*self._resumed, describe_batches(iterator, self.cfg.dataset))
        self._resumed, self._train_iterator = None, iterator
        return iterator

    def get_valid_iterator(self, subset: str, *args: Any, **kwargs: Any) -> Any:
        """Return the iterator over a validation set, which must have targets."""
        if getattr(self.task.dataset(subset), "tgt", True) is None:
            raise ValueError(
                f"the validation set `{subset}` must have a target side, but has none. Binarise "
                "both sides with fairseq-preprocess, or train with --disable-validation."
            )
        return super().get_valid_iterator(subset, *args, **kwargs)

    def valid_step(self, sample: Any, raise_oom: bool = False) -> Any:
        """Evaluate a batch, which may not be skipped if ranks wait for each other."""
        return super().valid_step(sample, raise_oom or self.is_spread)

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """Clip gradients by the norm of all gradients, including those of other ranks' experts."""
        if not self.is_spread:
            return super().clip_grad_norm(clip_norm)

        def add_experts(dense_norm: Tensor) -> Tensor:
            # In half precision, these are fp32 copies. fairseq also copies attributes such as the
            # mark of a shard.
            gradients = [p.grad for p in self.optimizer.params if is_shard(p)]
            return torch.hypot(dense_norm, shard_norm(gradients, self.group).to(dense_norm))

        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=add_experts)

    def _aggregate_logging_outputs(self, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:
            self._serve_others()
        return super()._aggregate_logging_outputs(*args, **kwargs)

    def _serve_others(self) -> None:
        """Serve this rank's experts to other ranks until all ranks have called this.

        The translations of --eval-bleu take a different number of steps on each rank. All ranks
        encode once; after that, only the decoder's layer is called.
        """
        model = self.get_model()
        for layer in moe_layers(getattr(model, "decoder", model)):
            layer.serve()

    # Checkpoints

    @contextmanager
    def saving_experts(self) -> Iterator[None]:
        """Write this rank's experts, and save a checkpoint without them in the `with` block.

        All ranks must call this. Expert files that no checkpoint needs any longer are deleted.
        """
        if self.cfg.checkpoint.no_save:
            yield
            return
        folder = Path(self.cfg.checkpoint.save_dir)
        if self.is_spread:
            num_experts = next(moe_layers(self.get_model())).config.num_experts
            model = self.get_model()
            own = own_experts(model, self._masters()), self._own_expert_state()
            self._manifest = save_experts(folder, num_experts, *own, self.group)
        try:
            yield
        finally:
            self._manifest = None
        if self.is_data_parallel_master:
            remove_unused_files(folder)

    def _masters(self) -> dict[str, Tensor]:
        return master_weights(self.get_model(), self.optimizer)

    def _own_expert_state(self) -> dict[int, dict[str, Tensor]]:
        if self.cfg.checkpoint.no_save_optimizer_state:
            return {}
        return own_expert_state(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the contents of a checkpoint, without the experts that are in separate files."""
        state = super().state_dict()
        masters = self._masters()
        state["model"].update(masters)
        extra_state = state["extra_state"]
        extra_state[SCALER] = scaler_state(self.optimizer)
        extra_state[NUM_PROCESSES] = self.data_parallel_world_size
        iterator = self._train_iterator
        if iterator is not None and iterator.iterations_in_epoch and not iterator.end_of_epoch():
            extra_state[BATCHES] = describe_batches(iterator, self.cfg.dataset)
        names = name_experts(self.get_model(), self.optimizer.params)
        if names:
            extra_state[EXPERT_NAMES] = names
        if self._manifest is not None:
            state[MANIFEST] = self._manifest
            own = own_experts(self.get_model(), masters), self._own_expert_state()
            leave_out_experts(state, *own)
        return state

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> str | None:
        """Write a checkpoint, unless it would lack other ranks' experts (as after an error).

        Returns:
            The path of the checkpoint; None if it was not written.
        """
        if self.is_spread and self._manifest is None:
            logger.warning(
                "not saving %s, because other processes hold some of its experts", filename
            )
            return None
        return super().save_checkpoint(filename, extra_state)

    def load_checkpoint(
        self, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Load a checkpoint written by any number of ranks. Each rank loads its own experts.

        Raises:
            ValueError: if --restore-file does not exist.
        """
        settings = self.cfg.checkpoint
        is_default = settings.restore_file == "checkpoint_last.pt"
        if not is_default and not PathManager.isfile(filename):
            raise ValueError(
                f"`--restore-file` must name a checkpoint, but there is no file `{filename}`. "
                "Leave it out to resume from checkpoint_last.pt, or to start from scratch."
            )
        model = self.get_model()
        with reading_for_training(self._complete), keeping_loaded(model) as loaded:
            extra_state = super().load_checkpoint(filename, reset_optimizer, *args, **kwargs)
        if extra_state is not None:
            set_master_weights(model, self.optimizer, loaded)
            if not reset_optimizer:
                set_scaler_state(self.optimizer, extra_state.get(SCALER, {}))
            now = self.data_parallel_world_size
            before = extra_state.get(NUM_PROCESSES, now)
            iterator = extra_state["train_iterator"]
            # fairseq counts batches per rank. Rounding down repeats a few batches.
            iterator["iterations_in_epoch"] = iterator.get("iterations_in_epoch", 0) * before // now
            is_reset = settings.reset_dataloader or filename == settings.finetune_from_model
            if iterator["iterations_in_epoch"] and not is_reset:
                self._resumed = iterator["epoch"], extra_state[BATCHES]
        return extra_state

    def _complete(self, path: Path, state: dict[str, Any]) -> None:
        """Add this rank's experts to a checkpoint, and entries that early checkpoints lack."""
        if state.get("cfg"):
            settings = describe_batches(None, state["cfg"]["dataset"])
            state["extra_state"].setdefault(BATCHES, settings)
        num_experts = state.get(MANIFEST, {}).get("num_experts")
        if num_experts is not None:
            restore_experts(path, state, self.group.owned(num_experts))
        elif self.is_spread:
            cut_experts(state, name_experts(self.get_model(), self.optimizer.params), self.group)
