"""Repairs to fairseq's handling of corpora, batches and precision, each applied only once."""

import argparse
import shutil
import sys

import numpy as np
import pytest
import torch
from fairseq.data import data_utils
from fairseq.distributed import utils as distributed_utils

from nmt_moe import compat, trainer
from nmt_moe.compat.precision import fix_flags
from tests.support.commands import call
from tests.support.stock_model import (
    count_updates,
    make_task,
    training,
    write_data,
)


def host() -> dict[tuple[str, ...], int]:
    """Return the ids of all objects in fairseq's modules and classes, and of the exception hook."""
    names: dict[tuple[str, ...], int] = {("hook",): id(sys.excepthook)}
    for module in [m for name, m in sys.modules.items() if name.startswith("fairseq")]:
        for name, value in vars(module).items():
            names[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                names |= {(module.__name__, name, k): id(v) for k, v in vars(value).items()}
    return names


REPAIRS = [*compat.REPAIRS, trainer.install]


@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.__name__)
def test_a_repair_is_applied_only_once(repair):
    before, types = host(), set(torch.serialization.get_safe_globals())
    repair()
    assert host() == before
    assert set(torch.serialization.get_safe_globals()) == types


def test_sides_of_different_length_are_named(stock):
    write_data(stock, "uneven")
    write_data(stock, "shorter", count=28)
    for file in (stock / "shorter").glob("*.bb.*"):
        shutil.copy(file, stock / "uneven")
    task = make_task(stock / "uneven")
    with pytest.raises(ValueError, match=r"uneven/train\.aa-bb\.\*` must have the same number"):
        task.load_dataset("train")


@pytest.mark.parametrize("count", [1, 7, 8, 20])
@pytest.mark.parametrize("limit", [{"max_sentences": 4}, {"max_tokens": 100}])
def test_the_last_batch_is_not_dropped(count, limit):
    batches = data_utils.batch_by_size(
        np.arange(count), lambda _: 5, required_batch_size_multiple=8, **limit
    )
    assert np.concatenate(batches).tolist() == list(range(count))
    assert all(len(batch) <= 4 for batch in batches) or "max_tokens" in limit


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_training_in_half_precision_resumes_on_cpu(stock, flag):
    save_dir = f"half{flag}"
    call("train", *training(stock, save_dir, 2, flag))
    assert count_updates(stock, save_dir) == 2
    call("train", *training(stock, save_dir, 4, flag))
    assert count_updates(stock, save_dir) == 4


def test_fp16_and_bf16_together_are_refused(stock):
    with pytest.raises(ValueError, match="`--fp16` and `--bf16` .* cannot be combined"):
        call("train", *training(stock, "both", 2, "--fp16", "--bf16"))


def test_bf16_means_a_tpu_only_if_there_is_xla(monkeypatch):
    args = argparse.Namespace(bf16=True, tpu=True)
    monkeypatch.setattr(distributed_utils, "xm", object())
    fix_flags(args)
    assert args.tpu
    monkeypatch.setattr(distributed_utils, "xm", None)
    fix_flags(args)
    assert not args.tpu
