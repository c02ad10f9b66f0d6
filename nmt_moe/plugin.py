"""Register the whole plugin with fairseq, even in a process started without `--user-dir`."""

import importlib
import pkgutil


def register() -> None:
    """Import every shell module so that fairseq knows all the names that the plugin registers.

    `--user-dir nmt_moe` does the same, but only if `nmt_moe` has not been imported before. If it
    has, fairseq merely logs "already imported". Tests and tools call this function; calling it
    again is harmless.
    """
    # This is fairseq's order for plugins; tasks/__init__.py imports compat, criterions and optim.
    for folder in ("tasks", "models"):
        package = importlib.import_module(f"nmt_moe.{folder}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not module.name.rsplit(".", 1)[-1].startswith("_"):
                importlib.import_module(module.name)
