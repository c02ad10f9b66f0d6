"""`nmt-moe hypotheses`: extract the translations from fairseq-generate's output."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.cli._paths import FILE
from nmt_moe.scoring.logs import read_hypotheses
from nmt_moe.text.lines import read_lines


@command("hypotheses", "nmt-moe hypotheses generate.log > translation.de")
@click.argument("log", type=FILE)
def hypotheses(log: Path) -> None:
    """Print the best translation of each sentence (D- lines of LOG) in the order of the text.

    LOG is the output of fairseq-generate. If the text was split into pieces, run fairseq-generate
    with --remove-bpe sentencepiece.
    """
    for line in read_hypotheses(read_lines(log, allow_controls=True)):
        click.echo(line)
