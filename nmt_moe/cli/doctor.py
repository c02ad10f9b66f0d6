"""`nmt-moe doctor`: show which software is installed and which parts work."""

from __future__ import annotations

import json
import logging

import click

from nmt_moe.cli._command import command

VERDICTS = {True: "works", False: "BROKEN", None: "unavailable"}


@command(
    "doctor",
    """
nmt-moe doctor
nmt-moe doctor --json > doctor.json
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Print versions, processor, memory and devices, and try each part of nmt_moe.

    The output is meant to be pasted into a bug report: it names neither the host nor its users. The
    exit status is 1 if a part is broken. A part that is missing but not needed on this machine does
    not count as broken.
    """
    from nmt_moe import diagnostics

    logging.disable(logging.INFO)  # fairseq logs while it is imported
    facts, parts = diagnostics.collect_facts(), diagnostics.try_parts()
    if as_json:
        content = {**facts, "parts": [part.to_dict() for part in parts]}
        click.echo(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        for group, values in facts.items():
            click.echo(f"{group}:")
            _print_table([(name, _show(value)) for name, value in values.items()])
        click.echo("parts:")
        _print_table([(part.name, f"{VERDICTS[part.works]}: {part.note}") for part in parts])
    broken = [part.name for part in parts if part.works is False]
    if broken:
        raise ValueError(f"broken: {', '.join(broken)}. See the reasons above.")


def _show(value: object) -> str:
    return "unknown" if value is None else str(value)


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max([len(name) for name, _ in rows], default=0)
    for name, value in rows:
        click.echo(f"  {name:<{width}}  {value}")
    if not rows:
        click.echo("  nothing set")
