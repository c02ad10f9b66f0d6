"""`nmt-moe check-environment`: whether this Python has everything nmt_moe needs."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import logging
import re
import sys
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nmt_moe.cli._command import command

# What only an import proves: compiled parts that fit this Python and this torch.
IMPORTS = (
    "torch",
    "fairseq",
    "fairseq.data.data_utils_fast",
    "fairseq.data.token_block_utils_fast",
)
HOST = "fairseq"  # its distribution has more than one name, so it is known by its import


def read_requirements() -> tuple[str, list[str]]:
    """Return the Python versions and the requirements of nmt_moe, extras as markers.

    They come from the `setup.cfg` of a clone, else from the installed distribution.
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


def find_missing(extras: tuple[str, ...]) -> list[str]:
    """Return a line for each requirement that is absent or has another version."""
    pythons, needs = read_requirements()
    here = ".".join(map(str, sys.version_info[:3]))
    missing = [] if here in SpecifierSet(pythons) else [f"python{pythons}: is {here}"]
    for need in map(Requirement, needs):
        wanted = need.marker is None or any(
            need.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        if not wanted or need.name.startswith(HOST):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{need.name}{need.specifier}: not installed")
            continue
        if not need.specifier.contains(version, prereleases=True):
            missing.append(f"{need.name}{need.specifier}: has {version}")
    return missing


def find_broken() -> list[str]:
    """Return a line for the first module that is absent or whose import fails."""
    for module in IMPORTS:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises
            reason = (str(error).strip().splitlines() or [""])[0]
            return [f"{module}: import failed ({type(error).__name__}: {reason})"]
    return []


@command(
    "check-environment",
    """
nmt-moe check-environment
nmt-moe check-environment --extra demo --extra dev
""",
)
@click.option("--extra", "extras", multiple=True, help="Also what this extra needs; repeatable.")
def check_environment(extras: tuple[str, ...]) -> None:
    """Check that this Python has everything nmt_moe needs; print what is missing.

    Versions are compared with the project's requirements, and torch, fairseq and its compiled parts
    are imported. Nothing is installed.
    """
    known = sorted({*re.findall(r'extra == "(\S+?)"', " ".join(read_requirements()[1]))})
    for extra in set(extras) - set(known):
        choices = ", ".join(map(repr, known))
        raise ValueError(f"`--extra` must be one of {choices}, but is '{extra}'.")
    logging.disable(logging.INFO)  # fairseq logs while it is imported
    missing = find_missing(extras)
    missing += [] if missing else find_broken()
    if missing:
        lines = "".join(f"\n  {line}" for line in missing)
        raise ValueError(f"{sys.executable} lacks what nmt_moe needs:{lines}")
    click.echo(f"{sys.executable} has everything nmt_moe needs")
