#!/usr/bin/env python3
"""Say whether this Python has everything nmt_moe needs, and if not, exactly what is missing.

It needs the standard library only, installs nothing, and exits with 1 if anything is missing.
"""

from __future__ import annotations

import argparse
import configparser
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
HOST = "fairseq (fairseq-fixed==0.12.3.1)"
# What only an import proves: compiled parts that fit this Python and this torch.
IMPORTS = [
    "torch",
    "fairseq",
    "fairseq.data.data_utils_fast",
    "fairseq.data.token_block_utils_fast",
]


def read_needs(extras: list[str]) -> list[str]:
    """Return the requirements of setup.cfg: those of every use, and those of the extras.

    The host is left out: it is known by its import, since its distribution has more than one name.
    """
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    blocks = [config["options"]["install_requires"]]
    blocks += [config["options.extras_require"][extra] for extra in extras]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    # The only marker in use: Triton exists for Linux alone.
    needs = [
        line.partition(";")[0]
        for line in lines
        if not line.endswith('sys_platform == "linux"') or sys.platform == "linux"
    ]
    return list(dict.fromkeys(need for need in needs if need))


def as_numbers(version: str) -> tuple[int, ...]:
    """Turn '2.13.0+cpu' into (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def find_missing(needs: list[str]) -> list[str]:
    """Return one line for each requirement that is absent or too old."""
    missing = []
    for need in needs:
        name, _, least = need.partition(">=")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{need}: not installed")
            continue
        if least and as_numbers(version) < as_numbers(least):
            missing.append(f"{need}: has {version}")
    return missing


def find_broken(modules: list[str]) -> list[str]:
    """Return one line for each module that is absent or whose import fails."""
    packages = [module for module in modules if "." not in module]
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    # torch is named by setup.cfg, so only the host is news.
    if absent:
        return [f"{HOST}: not installed"] if "fairseq" in absent else []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises
            reason = str(error).strip().splitlines()[:1]
            return [f"{module}: import failed ({type(error).__name__}: {''.join(reason)})"]
    return []


def find_broken_parts() -> list[str]:
    """Return one line for the first compiled part of fairseq that cannot be loaded by itself."""
    package = importlib.util.find_spec("fairseq")
    if package is None or package.origin is None or importlib.util.find_spec("torch") is None:
        return find_broken(IMPORTS)
    for module in IMPORTS:
        if not module.startswith("fairseq.data."):
            continue
        folder = Path(package.origin).parent / "data"
        finder = importlib.machinery.PathFinder()
        spec = finder.find_spec(module.rsplit(".", 1)[-1], [str(folder)])
        try:
            if spec is None or spec.loader is None:
                raise ImportError(f"it is not in {folder}")
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as error:  # whatever a broken installation raises
            return [f"{module}: import failed ({type(error).__name__}: {error})"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        choices=["demo", "test", "dev"],
        help="also what this extra of setup.cfg needs; may be repeated",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="import only fairseq's compiled parts, for an environment that passed the whole check",
    )
    arguments = parser.parse_args()
    missing = []
    if sys.version_info < OLDEST_PYTHON:
        here = ".".join(map(str, sys.version_info[:3]))
        missing.append(f"python>={'.'.join(map(str, OLDEST_PYTHON))}: is {here}")
    else:
        missing += find_missing(read_needs(arguments.extra))
        logging.disable(logging.INFO)  # fairseq talks while it is imported
        missing += find_broken_parts() if arguments.quick else find_broken(IMPORTS)
    if missing:
        print(f"{sys.executable} lacks what nmt_moe needs:", file=sys.stderr)
        for line in missing:
            print(f"  {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
