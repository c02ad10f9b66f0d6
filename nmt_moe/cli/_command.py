"""What all subcommands share: help that ends with examples, and the wording of mistakes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click


class Command(click.Command):
    """A command whose help ends with examples, printed as they are written."""

    def __init__(self, *args: Any, examples: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the options."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.strip().splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def command(name: str, examples: str, **options: Any) -> Callable[[Callable], Command]:
    """Decorate a function as the subcommand `name`; its docstring is the help.

    examples: command lines, one a line.
    """
    return click.command(name, cls=Command, examples=examples, **options)


class Mistake(click.ClickException):
    """A mistake of the user, shown as one message that names the command."""

    def __init__(self, command_name: str, message: str) -> None:
        super().__init__(message)
        self.command_name = command_name

    def show(self, file: IO[str] | None = None) -> None:
        """Write the message to standard error."""
        click.echo(f"{self.command_name}: error: {self.message}", file=file or sys.stderr)


@contextmanager
def reported_errors(ctx: click.Context) -> Iterator[None]:
    """Turn a ValueError or OSError into a message and exit status 1.

    With NMT_MOE_TRACEBACK=1 the exception itself passes.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads the output any more: click ends with status 1 and no message
    except (ValueError, OSError) as error:
        if os.environ.get("NMT_MOE_TRACEBACK") == "1":
            raise
        name = f"{ctx.command_path} {ctx.invoked_subcommand or ''}".rstrip()
        raise Mistake(name, str(error)) from error
