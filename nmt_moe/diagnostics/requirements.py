"""Compare the packages that nmt_moe needs with the installed ones."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# Modules to import. Only an import shows whether compiled parts fit this Python and torch.
IMPORTS = (
    "torch",
    "fairseq",
    "fairseq.data.data_utils_fast",
    "fairseq.data.token_block_utils_fast",
)
HOST = "fairseq"  # its distribution has more than one name, so it is recognised by its import


def read_requirements() -> tuple[str, list[str]]:
    """Return nmt_moe's supported Python versions and its requirements, with extras as markers.

    They are read from the `setup.cfg` of a clone, or else from the installed distribution.
    """
    setup = configparser.ConfigParser()
    if not setup.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8"):
        distribution = importlib.metadata.distribution("nmt-moe")
        return distribution.metadata["Requires-Python"], distribution.requires or []
    needs = setup["options"]["install_requires"].split("\n")
    for extra, lines in setup["options.extras_require"].items():
        for line in filter(None, lines.split("\n")):
            need, _, marker = line.partition(";")
            conditions = [f'extra == "{extra}"', *([f"({marker.strip()})"] if marker else [])]
            needs.append(f"{need}; {' and '.join(conditions)}")
    return setup["options"]["python_requires"], list(filter(None, needs))


def known_extras() -> list[str]:
    """Return the names of the extras."""
    return sorted({*re.findall(r'extra == "(\S+?)"', " ".join(read_requirements()[1]))})


def compare_requirements(extras: tuple[str, ...] = ()) -> dict[str, tuple[str | None, str]]:
    """Return the version of each required package, and a note if it does not fit.

    Args:
        extras: Extras that are also required.

    Returns:
        For each name, the version (or None) and a note such as "torch>=2.6: has 2.5.1". The note is
        empty if the version fits. `fairseq` is left out, because it is recognised by its import.
    """
    found: dict[str, tuple[str | None, str]] = {}
    for need in map(Requirement, read_requirements()[1]):
        wanted = need.marker is None or any(
            need.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        if not wanted or need.name.startswith(HOST):
            continue
        name = f"{need.name}{need.specifier}"
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found[need.name] = None, f"{name}: not installed"
            continue
        fits = need.specifier.contains(version, prereleases=True)
        found[need.name] = version, "" if fits else f"{name}: has {version}"
    return found


def find_missing(extras: tuple[str, ...]) -> list[str]:
    """Return a line for each requirement that is missing or has the wrong version."""
    pythons = read_requirements()[0]
    here = ".".join(map(str, sys.version_info[:3]))
    missing = [] if here in SpecifierSet(pythons) else [f"python{pythons}: is {here}"]
    return missing + [fault for _, fault in compare_requirements(extras).values() if fault]


def find_broken() -> list[str]:
    """Return a line for the first module that is missing or cannot be imported."""
    for module in IMPORTS:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation may raise anything
            return [f"{module}: import failed ({describe(error)})"]
    return []


def describe(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
