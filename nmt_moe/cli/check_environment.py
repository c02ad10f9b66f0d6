"""`nmt-moe check-environment`: check that this Python has everything nmt_moe needs."""

from __future__ import annotations

import logging
import sys

import click

from nmt_moe import diagnostics
from nmt_moe.cli._command import command


@command(
    "check-environment",
    """
nmt-moe check-environment
nmt-moe check-environment --extra demo --extra dev
""",
)
@click.option(
    "--extra", "extras", multiple=True, help="Also check the packages of this extra; repeatable."
)
def check_environment(extras: tuple[str, ...]) -> None:
    """Check that this Python has everything nmt_moe needs, and list everything that is missing.

    The command compares versions with the project's requirements, and imports torch, fairseq and
    fairseq's compiled parts. It installs nothing. `nmt-moe doctor` reports more, including details
    of the machine.
    """
    known = diagnostics.known_extras()
    for extra in set(extras) - set(known):
        choices = ", ".join(map(repr, known))
        raise ValueError(f"`--extra` must be one of {choices}, but is '{extra}'.")
    logging.disable(logging.INFO)  # fairseq logs while it is imported
    missing = diagnostics.find_missing(extras)
    missing += [] if missing else diagnostics.find_broken()
    if missing:
        lines = "".join(f"\n  {line}" for line in missing)
        raise ValueError(f"{sys.executable} does not meet nmt_moe's requirements:{lines}")
    click.echo(f"{sys.executable} has everything nmt_moe needs")
