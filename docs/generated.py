"""Directives that generate text from the code: options, architectures, commands.

```{options} nmt_moe.models.lstm_moe_gnmt:LSTMMoEGNMTConfig
```
"""

import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from enum import EnumMeta
from typing import Any

import click
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from nmt_moe import plugin
from nmt_moe.cli import main
from nmt_moe.planning import VOCABULARY, find_options, make_card, make_config

TYPES = {bool: "", int: "N", float: "X", str: "TEXT"}


class Generated(SphinxDirective):
    """A directive that becomes the Markdown text from `lines`."""

    def lines(self) -> Iterable[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        container = nodes.container()
        text = "\n".join(self.lines()).splitlines()
        self.state.nested_parse(StringList(text, "generated"), 0, container)
        return container.children


class Options(Generated):
    """A table of the options that dataclasses of this project add to fairseq's commands."""

    required_arguments = 1
    final_argument_whitespace = True

    def lines(self) -> Iterable[str]:
        plugin.register()
        found = {}
        for path in self.arguments[0].split():
            module, _, name = path.partition(":")
            config = getattr(importlib.import_module(module), name)
            ours = [part for part in config.__mro__ if part.__module__.startswith("nmt_moe.")]
            names = {name for part in ours for name in vars(part).get("__annotations__", {})}
            found |= {
                option.name: option
                for option in fields(config)
                if option.name in names and option.metadata.get("help")
            }
        rows = [(flag(one), f"`{default(one)}`", one.metadata["help"]) for one in found.values()]
        return table(("option", "default", "meaning"), rows)


class Architectures(Generated):
    """A table of a model's architectures, with their settings and costs."""

    required_arguments = 1

    def lines(self) -> Iterable[str]:
        rows = []
        for name, (options, args) in find_options().items():
            if options.__name__ != self.arguments[0]:
                continue
            config = make_config(options, args)
            card = make_card(name, config, VOCABULARY[type(config)])
            settings = ", ".join(f"`{flag_name(key)} {value}`" for key, value in vars(args).items())
            millions = [f"{count / 1e6:,.1f}" for count in (card.ops, card.params, card.active)]
            rows.append((f"`{name}`", *millions, settings or "the defaults"))
        head = ("architecture", "ops, M", "parameters, M", "active, M", "settings")
        return table(head, rows, right=(1, 2, 3))


class Commands(Generated):
    """The help texts of `nmt-moe` and all its commands."""

    def lines(self) -> Iterable[str]:
        for path, command in walk(main, "nmt-moe"):
            context = click.Context(command, info_name=path, max_content_width=100)
            yield f"**`{path}`**\n\n```text\n{command.get_help(context)}\n```\n"


def walk(command: click.Command, path: str) -> Iterable[tuple[str, click.Command]]:
    """Yield a command and all its subcommands, each with the words that call it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from walk(child, f"{path} {name}")


def flag(option: Field) -> str:
    """Return an option as users type it on the command line, with a placeholder for its value."""
    kind: Any = option.type
    value = TYPES.get(kind, "...")
    if isinstance(kind, EnumMeta):
        value = "{" + ",".join(str(one.value) for one in kind) + "}"  # type: ignore[var-annotated]
    return f"`{' '.join([flag_name(option.name), value]).strip()}`"


def flag_name(name: str) -> str:
    """Return the name of a field's option."""
    return f"--{name.replace('_', '-')}"


def default(option: Field) -> str:
    """Return an option's default as text."""
    value = option.default_factory() if option.default is MISSING else option.default
    return str(value) if value != "" else '""'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list:
    """Return a Markdown table."""
    rule = ["--:" if column in right else "---" for column in range(len(head))]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (head, rule, *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def set_orphans(app: Sphinx, docname: str, source: list[str]) -> None:
    """Tell Sphinx that the pages listed in `orphans` are not in any table of contents."""
    if docname in app.config.orphans:
        app.env.metadata[docname]["orphan"] = True


def escape_bars(app: Sphinx, kind: str, name: str, thing: Any, options: Any, lines: list) -> None:
    """Escape lengths such as |Y|, because reStructuredText would read them as substitutions."""
    lines[:] = [re.sub(r"\|(\w+)\|", r"\|\1\|", line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_config_value("orphans", [], "env")
    app.connect("source-read", set_orphans)
    app.connect("autodoc-process-docstring", escape_bars)
    app.add_directive("options", Options)
    app.add_directive("architectures", Architectures)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": False}
