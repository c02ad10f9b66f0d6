#!/usr/bin/env python3
"""Read fairseq's logs for the recipes: `logs.py COMMAND --help`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nmt_moe.cli import Group, command
from nmt_moe.scoring.logs import Loss, format_progress, read_entries, read_loss
from nmt_moe.text.lines import read_lines

LOG = click.argument("log", type=click.Path(path_type=Path))


def read_loss_of(log: Path) -> Loss:
    """Read the loss from a fairseq-eval-lm log; errors name the file."""
    try:
        return read_loss(read_lines(log, allow_controls=True))
    except ValueError as error:
        raise ValueError(f"`{log}` {error}. Run evaluate.sh again.") from None


@click.group(cls=Group)
def main() -> None:
    """Read fairseq's logs."""


@command("progress", "fairseq-train ... --log-format json | logs.py progress")
def progress() -> None:
    """Print one short line for each progress report in a training log on standard input."""
    for entry in read_entries(sys.stdin):
        line = format_progress(entry)
        if line:
            print(line, flush=True)


@command("loss", "logs.py loss test.log")
@LOG
def loss(log: Path) -> None:
    """Print bits per token and the number of tokens that fairseq-eval-lm scored."""
    found = read_loss_of(log)
    print(found.bits, found.tokens)


@command("perplexities", "logs.py perplexities validate.log")
@LOG
def perplexities(log: Path) -> None:
    """Print each direction with its perplexity, from fairseq-validate's JSON."""
    found: dict[str, str] = {}
    for entry in read_entries(read_lines(log, allow_controls=True)):
        for key, value in entry.items():
            if key.startswith("valid_") and key.endswith("_ppl") and "-" in key:
                found[key.removeprefix("valid_").removesuffix("_ppl")] = value
    if not found:
        raise ValueError(f"`{log}` has no perplexity of any direction. Run evaluate.sh again.")
    for direction, value in found.items():
        print(direction, value)


for subcommand in (progress, loss, perplexities):
    main.add_command(subcommand)

if __name__ == "__main__":
    main()
