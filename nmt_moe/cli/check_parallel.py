"""`nmt-moe check-parallel`: check that texts are parallel line by line."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.cli._paths import FILE
from nmt_moe.text import parallel


@command("check-parallel", "nmt-moe check-parallel train.en train.de")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--allow-empty", is_flag=True, help="Accept lines without text.")
def check_parallel(files: tuple[Path, ...], allow_empty: bool) -> None:
    """Check that FILES are valid UTF-8 and have the same number of lines, none of them empty.

    Only a line feed ends a line, as in fairseq. Files named *.gz and *.xz are decompressed.
    """
    count = parallel.check_parallel(files, allow_empty)
    click.echo(f"{' '.join(path.name for path in files)}: number of lines: {count}")
