"""Register the paper's schedule as `--lr-scheduler warmup_hold_inverse_sqrt`."""

from dataclasses import dataclass, field
from typing import Any, List, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from nmt_moe.checks import check_range
from nmt_moe.training import warmup_hold_inverse_sqrt


@dataclass
class WarmupHoldInverseSqrtConfig(FairseqDataclass):
    """Options of the schedule. The defaults are the values the paper uses for translation."""

    warmup_updates: int = field(
        default=2000,
        metadata={"help": "number of updates during which the rate rises linearly to --lr"},
    )
    hold_updates: int = field(
        default=8000,
        metadata={"help": "number of updates at --lr before the rate falls as 1/sqrt(update)"},
    )
    warmup_init_lr: float = field(
        default=0.0, metadata={"help": "rate at the start of the warm-up"}
    )
    lr: List[float] = II("optimization.lr")


@register_lr_scheduler("warmup_hold_inverse_sqrt", dataclass=WarmupHoldInverseSqrtConfig)
class WarmupHoldInverseSqrt(FairseqLRScheduler):
    """A learning rate that rises linearly, stays constant, and then falls as 1 / sqrt(update)."""

    def __init__(self, cfg: WarmupHoldInverseSqrtConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        if len(cfg.lr) != 1:
            raise ValueError(
                "`--lr` must be a single rate for `--lr-scheduler warmup_hold_inverse_sqrt`, but "
                f"is {list(cfg.lr)}."
            )
        check_range("--warmup-updates", cfg.warmup_updates, 0)
        check_range("--hold-updates", cfg.hold_updates, 0)
        check_range("--warmup-init-lr", cfg.warmup_init_lr, 0)
        self.step_update(0)

    def step(self, epoch: int, val_loss: Optional[float] = None) -> float:
        """Leave the rate unchanged at the end of an epoch, and return it."""
        super().step(epoch, val_loss)
        return self.optimizer.get_lr()

    def step_update(self, num_updates: int) -> float:
        """Set the rate of the update that follows `num_updates` updates, and return it."""
        self.optimizer.set_lr(
            warmup_hold_inverse_sqrt(
                num_updates,
                self.cfg.lr[0],
                self.cfg.warmup_updates,
                self.cfg.hold_updates,
                self.cfg.warmup_init_lr,
            )
        )
        return self.optimizer.get_lr()
