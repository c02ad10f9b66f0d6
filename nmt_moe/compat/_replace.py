"""Replace functions of fairseq by repaired ones."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fairseq.distributed import utils as distributed_utils

# Attribute of a repaired function: what made it.
MAKERS = "__nmt_moe_makers__"

Maker = Callable[[Callable], Callable]

# Functions to replace in the module of a command, by the command's name.
_IN_COMMANDS: dict[str, list[tuple[str, Maker]]] = {}


def replace(owner: Any, name: str, make: Maker) -> None:
    """Replace `owner.name` by `make(original)`, once however often this is called."""
    original = getattr(owner, name)
    key = f"{make.__module__}.{make.__qualname__}"
    makers = getattr(original, MAKERS, ())
    if key in makers:
        return
    repaired = functools.wraps(original)(make(original))
    setattr(repaired, MAKERS, (*makers, key))
    setattr(owner, name, repaired)


def replace_in_command(command: str, name: str, make: Maker) -> None:
    """Replace a function in the module `fairseq_cli.COMMAND`, which looks it up when it runs.

    The module may be loaded before the plugin or after it, and under `python -m` it is `__main__`.
    So what is loaded is repaired now, and the rest when a command calls `call_main`.
    """
    _IN_COMMANDS.setdefault(command, []).append((name, make))
    for module in (sys.modules.get(f"fairseq_cli.{command}"), sys.modules.get("__main__")):
        if module is not None:
            _repair_command(module)
    replace(distributed_utils, "call_main", _repairing_command)


def _repairing_command(call: Callable) -> Callable:
    def call_main(cfg: Any, main: Callable, **kwargs: Any) -> Any:
        _repair_command(sys.modules[main.__module__])
        return call(cfg, main, **kwargs)

    return call_main


def _repair_command(module: ModuleType) -> None:
    # Of a module that is run, the name is `__main__`; what it was found as stands in its spec.
    name = getattr(module.__spec__, "name", "")
    for attribute, make in _IN_COMMANDS.get(name.removeprefix("fairseq_cli."), []):
        replace(module, attribute, make)
