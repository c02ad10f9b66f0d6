"""Read checkpoints with their experts, which may be in separate files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils

from nmt_moe.checkpoints import restore_experts

# Further checks of a checkpoint before its model is built: functions of its path and contents.
CHECKS: list[Callable[[str, dict[str, Any]], None]] = []


def reading_all_experts(read: Callable) -> Callable:
    """Wrap fairseq's reader for commands that need all experts but not their optimizer state."""

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = read(path, *args, **kwargs)
        restore_experts(Path(path), state, with_optimizer=False)
        for check in CHECKS:
            check(path, state)
        return state

    return load_checkpoint_to_cpu


@contextmanager
def reading_for_training(complete: Callable[[Path, dict[str, Any]], None]) -> Iterator[None]:
    """Let a trainer complete each checkpoint that the `with` block reads.

    Args:
        complete: Function called with the path and contents of each checkpoint, without its expert
            files.
    """
    reader = checkpoint_utils.load_checkpoint_to_cpu
    read = reader.__wrapped__

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = read(path, *args, **kwargs)
        complete(Path(path), state)
        return state

    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    try:
        yield
    finally:
        checkpoint_utils.load_checkpoint_to_cpu = reader
