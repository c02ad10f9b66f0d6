"""The command `nmt-moe`: a group that imports its subcommands only when they are run.

Each subcommand has an entry in `COMMANDS`, and a module of this package defines its `click`
command, which reads the options and calls the library. `_command.command` creates a command with
examples at the end of its help.
"""

from __future__ import annotations

import importlib

import click

from nmt_moe import __version__
from nmt_moe.cli._command import Group, command, list_option

__all__ = ["COMMANDS", "Group", "command", "list_option", "main"]

# Maps each name to the import path of its click command and its line in `nmt-moe --help`.
COMMANDS = {
    "average": (
        "nmt_moe.cli.average:average",
        "Average the parameters of several checkpoints.",
    ),
    "card": (
        "nmt_moe.cli.card:card",
        "Print the operations, parameters and memory of architectures.",
    ),
    "check-environment": (
        "nmt_moe.cli.check_environment:check_environment",
        "Check that this Python has everything nmt_moe needs.",
    ),
    "check-parallel": (
        "nmt_moe.cli.check_parallel:check_parallel",
        "Check that parallel texts have the same number of lines, none of them empty.",
    ),
    "doctor": (
        "nmt_moe.cli.doctor:doctor",
        "Print versions and hardware, and try each part of nmt_moe.",
    ),
    "experts": (
        "nmt_moe.cli.experts:experts",
        "Show how experts are used on a text; prune, merge or upcycle them.",
    ),
    "export": (
        "nmt_moe.cli.export:export",
        "Export a checkpoint as a bundle, a folder that can be used without fairseq.",
    ),
    "hypotheses": (
        "nmt_moe.cli.hypotheses:hypotheses",
        "Extract the translations from fairseq-generate's output, in the order of the text.",
    ),
    "lm": ("nmt_moe.cli.lm:lm", "Score text with an exported language model, or sample text."),
    "pieces": (
        "nmt_moe.cli.pieces:pieces",
        "Learn sentence pieces, split text into them, and join them again.",
    ),
    "plan": (
        "nmt_moe.cli.plan:plan",
        "Predict the memory, traffic and time of training on a cluster.",
    ),
    "plot": ("nmt_moe.cli.plot:plot", "Plot loss, perplexity and balance from training logs."),
    "report": (
        "nmt_moe.cli.report:report",
        "Write a page on how a model uses its experts on a text and how well it translates.",
    ),
    "reshape": (
        "nmt_moe.cli.reshape:reshape",
        "Verify a checkpoint, or merge or split its expert files.",
    ),
    "score": (
        "nmt_moe.cli.score:score",
        "Score a translation with chrF, TER and several kinds of BLEU.",
    ),
    "serve": ("nmt_moe.cli.serve:serve", "Serve exported models over HTTP, with a web page."),
    "sweep": (
        "nmt_moe.cli.sweep:sweep",
        "Tune alpha and beta of GNMT's search by computing BLEU over a grid.",
    ),
    "translate": ("nmt_moe.cli.translate:translate", "Translate text with an exported model."),
    "verify": (
        "nmt_moe.cli.verify:verify",
        "Check that an exported model is complete and undamaged.",
    ),
}


class LazyGroup(click.Group):
    """A group that lists commands without importing them, so that help does not need torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; return None if `cmd_name` is not a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command's name and its line of help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group("nmt-moe", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="nmt-moe")
def main() -> None:
    """Work with mixture-of-experts translation models before, during and after their training.

    `nmt-moe COMMAND --help` shows a command's options with examples. A command that fails prints
    one message and exits with status 1; set NMT_MOE_TRACEBACK=1 to see the traceback.
    """
