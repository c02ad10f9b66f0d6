"""End training if its launcher has ended, and report the saved checkpoint on interruption."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fairseq.distributed import utils as distributed_utils
from fairseq.logging import progress_bar

from nmt_moe.compat._replace import replace
from nmt_moe.compat.errors import command_name
from nmt_moe.compat.processes import is_under_torchrun

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WATCH_EVERY = 1.0  # seconds
CLOSED_WITHIN = 5.0  # seconds
# Read as early as possible: a launcher may end while its ranks are still starting.
LAUNCHER = os.getppid()


def end_with_the_launcher() -> None:
    """End a rank once the torchrun that started it has ended.

    Reason: if torchrun is killed by SIGKILL, it cannot end its ranks, which would keep training
    alongside the ranks of the next torchrun.
    """
    replace(distributed_utils, "call_main", _watching_launcher)


def _watching_launcher(call: Callable) -> Callable:
    def call_main(cfg: Any, main: Callable, **kwargs: Any) -> Any:
        if is_under_torchrun():
            threading.Thread(target=_end_after, args=(LAUNCHER,), daemon=True).start()
        return call(cfg, main, **kwargs)

    return call_main


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_EVERY)
    _end(1, f"{command_name()}: stopped, because the torchrun that started this process has ended")


def explain_stops() -> None:
    """Report the saved checkpoint in one line, on one rank, after Ctrl-C or SIGTERM.

    Reason: otherwise a traceback is printed, or nothing. A checkpoint gets its name only when it is
    complete, so the process may end at any moment.
    """
    replace(distributed_utils, "call_main", _explaining_stops)


def _explaining_stops(call: Callable) -> Callable:
    def call_main(cfg: Any, main: Callable, **kwargs: Any) -> Any:
        is_main_thread = threading.current_thread() is threading.main_thread()
        if command_name() == "fairseq-train" and is_main_thread:
            _watch_signals(cfg.checkpoint.save_dir)
        return call(cfg, main, **kwargs)

    return call_main


def _watch_signals(save_dir: str) -> None:
    """Handle signals in a thread, because the main one may be waiting for other ranks."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_end_at_signal, args=(read_end, save_dir), daemon=True).start()


def _end_at_signal(read_end: int, save_dir: str) -> None:
    number = 0
    while number not in SIGNALS:
        number = os.read(read_end, 1)[0]
    last = os.path.join(save_dir, "checkpoint_last.pt")
    left = (
        f"`{last}` is complete: run the same command again to resume from it"
        if os.path.exists(last)
        else f"no `{last}` has been written yet"
    )
    said = f"{command_name()}: stopped by {signal.Signals(number).name}; {left}"
    _end(128 + number, said if os.environ.get("RANK", "0") == "0" else None)


def _end(status: int, message: str | None) -> None:
    try:
        sys.stdout.flush()
        if message is not None:
            print(message, file=sys.stderr, flush=True)  # noqa: T201 - the command's last message
    finally:
        # Flush the events that wait for TensorBoard's thread. The time is limited, because the disk
        # may hang.
        closing = threading.Thread(target=progress_bar._close_writers, daemon=True)
        closing.start()
        closing.join(CLOSED_WITHIN)
        # Exit even if nobody reads the output: Ctrl-C also ends the `tee` of `fairseq-train | tee`.
        os._exit(status)
