"""Check that a resumed epoch has the same batches as when it started."""

import hashlib
from typing import Any

import numpy as np
from fairseq.data import EpochBatchIterator


def describe_batches(iterator: Any, dataset: Any) -> dict[str, Any]:
    """Return a description of an epoch's batches to store in a checkpoint.

    Args:
        iterator: The epoch's iterator.
        dataset: The data settings; an error message names those that changed.
    """
    settings = {name: dataset[name] for name in ("batch_size", "max_tokens")}
    if not isinstance(iterator, EpochBatchIterator):
        return settings
    digest = hashlib.sha256(str(iterator.seed).encode())
    if iterator.grouped_shuffling:
        digest.update(str(iterator.num_shards).encode())
    for batch in iterator.frozen_batches:
        digest.update(np.asarray([len(batch), *batch], dtype=np.int64).tobytes())
    return {**settings, "digest": digest.hexdigest()}


def check_batches(epoch: int, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Reject a resumed epoch if it would now be divided into other batches.

    Otherwise, some sentences would be seen twice, and others not at all.

    Raises:
        ValueError: if the batches differ; the message names the settings that changed.
    """
    if "digest" in saved and "digest" in now:
        is_same = saved["digest"] == now["digest"]
    else:
        is_same = all(saved[name] == now[name] for name in ("batch_size", "max_tokens"))
    if is_same:
        return
    changed = [
        f"`--{name.replace('_', '-')}` was {saved[name]} and is now {now[name]}"
        for name in ("batch_size", "max_tokens")
        if saved[name] != now[name]
    ]
    reason = "; ".join(changed) or "the data or the seed is not the same"
    raise ValueError(
        f"the checkpoint is from the middle of epoch {epoch}, so the batches must be the same as "
        f"before, but {reason}. Some sentences would be seen twice, and others not at all. Finish "
        "the epoch with the previous settings, or restart at epoch 1 with --reset-dataloader."
    )
