"""The learning rate rises, is constant, and then falls as 1 / sqrt(update)."""

import pytest
import torch
from fairseq.optim import build_optimizer
from omegaconf import OmegaConf

from nmt_moe import plugin

plugin.register()

from nmt_moe.optim.warmup_hold_inverse_sqrt import (  # noqa: E402
    WarmupHoldInverseSqrt,
    WarmupHoldInverseSqrtConfig,
)

WARMUP, HOLD = 20, 80


def make_schedule(**options: object) -> WarmupHoldInverseSqrt:
    adam = {"_name": "adam", "lr": [1.0], "adam_betas": "(0.9, 0.999)", "adam_eps": 1e-8}
    rest = {"weight_decay": 0.0, "use_old_adam": False, "fp16_adam_stats": False, "tpu": False}
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = build_optimizer(OmegaConf.create({**adam, **rest}), parameters)
    values = {"warmup_updates": WARMUP, "hold_updates": HOLD, "lr": [0.4], **options}
    config = OmegaConf.structured(WarmupHoldInverseSqrtConfig(**values))
    return WarmupHoldInverseSqrt(config, optimizer)


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        pytest.param(0, 0.0, id="the-first-update"),
        pytest.param(WARMUP // 2, 0.2, id="half-way-up"),
        pytest.param(WARMUP, 0.4, id="at-the-top"),
        pytest.param(WARMUP + HOLD, 0.4, id="the-last-of-the-plateau"),
        # After four times the updates, the rate is half as high.
        pytest.param(4 * (WARMUP + HOLD), 0.2, id="falling"),
    ],
)
def test_the_rate_by_hand(update: int, rate: float):
    schedule = make_schedule()
    assert schedule.step_update(update) == pytest.approx(rate)
    assert schedule.optimizer.get_lr() == pytest.approx(rate)


def test_the_warmup_starts_at_the_given_rate():
    # The expected rate is halfway from 0.1 to 0.4.
    assert make_schedule(warmup_init_lr=0.1).step_update(WARMUP // 2) == pytest.approx(0.25)
    assert make_schedule(warmup_init_lr=0.1).optimizer.get_lr() == pytest.approx(0.1)


def test_without_warmup_the_first_rate_is_the_highest():
    assert make_schedule(warmup_updates=0, hold_updates=0).optimizer.get_lr() == pytest.approx(0.4)


def test_the_end_of_an_epoch_does_not_change_the_rate():
    schedule = make_schedule()
    schedule.step_update(WARMUP // 2)
    assert schedule.step(1, val_loss=9.0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": [0.1, 0.2]}, r"`--lr` must be a single rate .* \[0.1, 0.2\]"),
        ({"warmup_updates": -1}, "`--warmup-updates` must be at least 0, but is -1"),
        ({"hold_updates": -5}, "`--hold-updates` must be at least 0, but is -5"),
    ],
)
def test_an_invalid_schedule_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_schedule(**options)
