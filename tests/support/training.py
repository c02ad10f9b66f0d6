"""The flags of a training run that takes seconds, and helpers that check its checkpoints."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nmt_moe.checkpoints import MANIFEST, restore_experts

SIZES = ["--model-dim", 16, "--lstm-hidden-dim", 24, "--init-range", 0.3, "--dropout", 0.1]
EXPERTS = ["--num-experts", 4, "--moe-top-k", 2, "--expert-hidden-dim", 16]
# The corpus has 96 sentences in batches of 16, so an epoch has 6 updates.
UPDATES = [
    *["--criterion", "moe_label_smoothed_cross_entropy", "--label-smoothing", 0.1],
    *["--optimizer", "adam", "--lr", 0.02, "--clip-norm", 5.0, "--seed", 3],
    *["--lr-scheduler", "warmup_hold_inverse_sqrt", "--warmup-updates", 4, "--hold-updates", 20],
    *["--batch-size", 16, "--num-workers", 0, "--cpu", "--log-format", "json"],
]
TINY_MOE = ["--arch", "lstm_moe_gnmt", *SIZES, *EXPERTS, *UPDATES]
TINY_DENSE = ["--arch", "lstm_gnmt", *SIZES, *UPDATES]
TRANSLATE = ["--cpu", "--num-workers", 0, "--max-len-b", 20]

BALANCE_KEYS = {
    f"{layer}moe_{key}"
    for layer in ("", "encoder_", "decoder_")
    for key in ("cv_importance", "cv_load", "max_load")
}


@contextmanager
def without_updates() -> Iterator[None]:
    """Check that training makes no update."""
    with mock.patch("fairseq.trainer.Trainer.train_step") as step:
        yield
    step.assert_not_called()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint with torch's safe loader, allowing only torch's own list of types."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)


def copy_checkpoint(path: Path, folder: Path) -> None:
    """Copy a checkpoint with its expert files, so that training in `folder` continues from it."""
    shutil.copy(path, folder / "checkpoint_last.pt")
    for entry in load(path)[MANIFEST]["files"]:
        shutil.copy(path.parent / entry["name"], folder)


def load_whole(path: Path) -> dict[str, Any]:
    """Read a checkpoint together with the experts in the files beside it."""
    state = load(path)
    restore_experts(path, state)
    return state


def assert_same_bits(expected: Any, actual: Any, name: str = "") -> None:
    """Compare nested values; tensors must be bit-identical."""
    assert type(expected) is type(actual), name
    if isinstance(expected, Tensor):
        assert torch.equal(expected, actual), name
    elif isinstance(expected, dict):
        assert expected.keys() == actual.keys(), name
        for key, value in expected.items():
            assert_same_bits(value, actual[key], f"{name}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(actual), name
        for index, value in enumerate(expected):
            assert_same_bits(value, actual[index], f"{name}.{index}")
    else:
        assert expected == actual, name
