"""Put a repaired function in the place of fairseq's own."""

import functools
from collections.abc import Callable
from typing import Any

MARK = "__nmt_moe_repaired__"


def replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace `owner.name` by `make(original)`, once however often this is called."""
    original = getattr(owner, name)
    if hasattr(original, MARK):
        return
    repaired = functools.wraps(original)(make(original))
    setattr(repaired, MARK, True)
    setattr(owner, name, repaired)
