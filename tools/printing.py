"""Print to a reader that may stop early: `cost_card.py --all | head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def run(main: Callable[[], int]) -> int:
    """Run a program; if nobody reads its output any more, end it with status 1, without a word.

    Source: the Python documentation, library/signal, "Note on SIGPIPE".
    """
    try:
        status = main()
        # Here rather than when Python exits, where the error could not be caught.
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits; what is left must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
