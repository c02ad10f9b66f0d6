"""Replace fairseq functions with repaired ones."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fairseq.distributed import utils as distributed_utils

# Attribute of a repaired function that lists the makers applied to it.
MAKERS = "__nmt_moe_makers__"

Maker = Callable[[Callable], Callable]

# Functions to replace in a command's module, by the command's name.
_IN_COMMANDS: dict[str, list[tuple[str, Maker]]] = {}


def replace(owner: Any, name: str, make: Maker) -> None:
    """Replace `owner.name` with `make(original)`; calling this again changes nothing."""
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

    The module may be loaded before or after the plugin, and under `python -m` it is `__main__`.
    Therefore, loaded modules are repaired now, and others when a command calls `call_main`.
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
    # A module run as a program is named `__main__`; its spec has its real name.
    name = getattr(module.__spec__, "name", "")
    for attribute, make in _IN_COMMANDS.get(name.removeprefix("fairseq_cli."), []):
        replace(module, attribute, make)
