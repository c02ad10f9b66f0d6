"""Give all subcommands examples in the help, options that take lists, and short error messages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

import click

from nmt_moe.checks import check_whole, describe_os_error

# Starting far more threads than this crashes the process.
MAX_THREADS = 1024
# Names in messages for values that come from an option with another name.
OTHER_NAMES = {"beam_size": "beam", "num_hypotheses": "nbest", "length_exponent": "lenpen"}


class WithExamples(click.Command):
    """A command or group with examples at the end of its help."""

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


class Group(WithExamples, click.Group):
    """A command with subcommands."""


class Command(WithExamples):
    """A command that reports a user's mistake as one message.

    If NMT_MOE_TRACEBACK=1 is set, the exception itself is raised.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments, reading `--inputs a b` as `--inputs a --inputs b`."""
        lists = {n for option in self.params if isinstance(option, List) for n in option.opts}
        with mistakes_as_messages(ctx):
            return super().parse_args(ctx, spread_lists(args, lists))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn a ValueError or OSError into a message and exit status 1."""
        with mistakes_as_messages(ctx):
            return super().invoke(ctx)


@contextmanager
def mistakes_as_messages(ctx: click.Context) -> Iterator[None]:
    """Turn a ValueError or OSError into a `Mistake`, unless its traceback is wanted."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader closed the pipe: click exits with status 1 and no message
    except (ValueError, OSError) as error:
        if os.environ.get("NMT_MOE_TRACEBACK") == "1":
            raise
        message = name_options(describe_error(error), ctx.command.params)
        raise Mistake(ctx.command_path, message) from error


def describe_error(error: ValueError | OSError) -> str:
    """Return an error's message, which names the file and the reason if the system gave them."""
    return describe_os_error(error) if isinstance(error, OSError) else str(error)


def name_options(message: str, params: list[click.Parameter]) -> str:
    """Replace the Python names of options, as in "`beam_size` must be", by the command's names."""
    options = {
        param.name: max(param.opts, key=len) for param in params if isinstance(param, click.Option)
    }
    options |= {own: options[name] for own, name in OTHER_NAMES.items() if name in options}
    return re.sub(
        r"`(\w+)`(?= must )", lambda match: f"`{options.get(match[1], match[1])}`", message
    )


class List(click.Option):
    """An option with one or more values, `--inputs a b c`, like argparse's `nargs="+"`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "multiple": True})


def spread_lists(args: list[str], names: set[str]) -> list[str]:
    """Repeat each option in `names` before every value that follows it."""
    spread: list[str] = []
    name, is_first = "", True
    for arg in args:
        if arg.startswith("-") and not re.match(r"-(\.?\d|$)", arg):
            name, is_first = (arg if arg in names else ""), True
            spread.append(arg)
        else:
            spread += [arg] if is_first or not name else [name, arg]
            is_first = False
    return spread


def command(name: str, examples: str, **options: Any) -> Callable[[Callable], Command]:
    """Decorate a function as the subcommand `name`, with the function's docstring as help.

    `examples` contains command lines.
    """
    return click.command(name, cls=Command, examples=examples, **options)


def list_option(*names: str, **options: Any) -> Callable[[Callable], Callable]:
    """Decorate a command with an option that takes one or more values, passed on as a tuple."""
    return click.option(*names, cls=List, **options)


def check_threads(threads: int) -> None:
    """Reject an unusable value of `--threads`.

    Raises:
        ValueError: if it is out of bounds. The message names the option and both bounds.
    """
    check_whole("--threads", threads, 1, MAX_THREADS)


def set_threads(threads: int | None) -> None:
    """Set how many CPU threads torch uses; None keeps the default.

    Raises:
        ValueError: as in `check_threads`.
    """
    if threads is not None:
        check_threads(threads)
        import torch

        torch.set_num_threads(threads)


def standard_input() -> BinaryIO:
    """Return standard input as a binary stream.

    Raises:
        ValueError: if standard input is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed. Name a file, or pipe text into the command.")
    return sys.stdin.buffer


class Mistake(click.ClickException):
    """A user's mistake, shown as one message that names the command."""

    def __init__(self, command_path: str, message: str) -> None:
        super().__init__(message)
        self.command_path = command_path

    def show(self, file: IO[str] | None = None) -> None:
        """Write the message to standard error."""
        click.echo(f"{self.command_path}: error: {self.message}", file=file or sys.stderr)
