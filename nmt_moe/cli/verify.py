"""`nmt-moe verify`: check that a bundle is complete and undamaged."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.cli._paths import BUNDLE


@command("verify", "nmt-moe verify en-de")
@click.argument("folder", type=BUNDLE)
def verify(folder: Path) -> None:
    """Read the bundle FOLDER, and compare every file and every expert with its SHA-256 hash.

    To verify a checkpoint, use `nmt-moe reshape verify`.
    """
    from nmt_moe.inference import verify_bundle

    click.echo(f"{folder}: {verify_bundle(folder)}")
