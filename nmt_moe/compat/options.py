"""Suggest close names, show all options in help, and take the task from a checkpoint."""

import difflib
import re
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any, NoReturn

from fairseq import options

from nmt_moe.compat._replace import replace
from nmt_moe.compat.errors import is_fairseq_command

MANY_CHOICES = 12
# Beginnings of warnings from hydra, from torch's data loader and from its mixed precision.
OF_LIBRARIES = (
    r"\s*'config' is validated against ConfigStore schema",
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"`torch\.cuda\.amp\.",
)


def let_validate_read_the_task_from_the_checkpoint() -> None:
    """Let fairseq-validate run without `--task`.

    Reason: without the option, it fails with `KeyError: None`. The parsed arguments only locate the
    data; the task is built from the checkpoint's own configuration.
    """
    replace(options, "parse_args_and_arch", _validating)


def _validating(parse: Callable) -> Callable:
    def parse_args_and_arch(parser: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        # The parsers of other commands have a default; this parser leaves out options that are not
        # set.
        if parser.get_default("task") is None:
            parser.set_defaults(task="translation")
        return parse(parser, *args, **kwargs)

    return parse_args_and_arch


def suggest_close_names() -> None:
    """Suggest the names that are most similar to an unknown name.

    Reason: fairseq prints all options and about a hundred architectures.
    """
    replace(options, "parse_args_and_arch", _suggesting)


def _suggesting(parse: Callable) -> Callable:
    def parse_args_and_arch(parser: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        def end(message: str) -> NoReturn:
            parser.exit(2, f"{parser.prog}: error: {shorten_choices(message)}\n")

        vars(parser)["error"] = end
        return parse(parser, *args, **kwargs)

    return parse_args_and_arch


def shorten_choices(message: str) -> str:
    """Shorten argparse's list of choices to those that resemble the given name."""
    found = re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message, re.DOTALL)
    if found is None:
        return message
    start, name, listed = found.groups()
    choices = [choice.strip(" '") for choice in listed.split(",")]
    if len(choices) <= MANY_CHOICES:
        return message
    close = difflib.get_close_matches(name, choices, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "--help lists all."
    return f"{start}: {hint} Names from a plugin need its --user-dir."


def show_options_of_chosen_parts_in_help() -> None:
    """Let `--help` list the options of the named architecture, criterion and optimizer.

    Reason: fairseq prints its help before it adds these options to the parser.
    """
    replace(options, "parse_args_and_arch", _helping)


def _helping(parse: Callable) -> Callable:
    def parse_args_and_arch(
        parser: ArgumentParser, input_args: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        given = sys.argv[1:] if input_args is None else input_args
        others = [word for word in given if word not in ("-h", "--help")]
        if len(others) == len(given):
            return parse(parser, input_args, *args, **kwargs)

        def show(*_: Any) -> NoReturn:
            parser.print_help()
            parser.exit()

        # fairseq calls `parse_known_args` before it has added all options, and `parse_args`
        # afterwards.
        vars(parser)["parse_args"] = show
        return parse(parser, others, *args, **kwargs)

    return parse_args_and_arch


def drop_warnings_of_libraries() -> None:
    """Suppress warnings about how fairseq calls hydra and torch, which every command would print.

    Reason: users cannot change these calls, and twenty such lines hide the relevant ones.
    """
    if is_fairseq_command():
        warnings.filterwarnings("ignore", module=r"hydra\b")
        for message in OF_LIBRARIES:
            warnings.filterwarnings("ignore", message)
