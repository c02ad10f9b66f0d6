"""The command `nmt-moe`: one group whose subcommands are imported only when they are run.

A subcommand is a line of `COMMANDS` and a `click` command in a module of this folder, which reads
options and calls the library; `_command.command` makes one whose help ends with examples.
"""

from __future__ import annotations

import importlib

import click

from nmt_moe import __version__
from nmt_moe.cli._command import Group, command, list_option

__all__ = ["COMMANDS", "Group", "command", "list_option", "main"]

# Name -> where its click command is, and its line in `nmt-moe --help`.
COMMANDS = {
    "average": (
        "nmt_moe.cli.average:average",
        "Average the parameters of several checkpoints of one training.",
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
        "Check that texts have the same number of lines, none of them empty.",
    ),
    "doctor": (
        "nmt_moe.cli.doctor:doctor",
        "Print versions and hardware, and try each part of nmt_moe.",
    ),
    "experts": (
        "nmt_moe.cli.experts:experts",
        "What experts do on a text; prune, merge or upcycle them.",
    ),
    "export": (
        "nmt_moe.cli.export:export",
        "Write a checkpoint as a folder that translates without fairseq.",
    ),
    "hypotheses": (
        "nmt_moe.cli.hypotheses:hypotheses",
        "Take the translations out of fairseq-generate's output, in the order of the text.",
    ),
    "lm": ("nmt_moe.cli.lm:lm", "Score text with an exported language model, or draw text."),
    "pieces": (
        "nmt_moe.cli.pieces:pieces",
        "Learn sentence pieces, cut text into them, join them again.",
    ),
    "plan": (
        "nmt_moe.cli.plan:plan",
        "Predict memory, traffic and time of a training on a cluster.",
    ),
    "plot": ("nmt_moe.cli.plot:plot", "Draw loss, perplexity and balance from training logs."),
    "report": (
        "nmt_moe.cli.report:report",
        "Show what a model's experts are for on a text, and how good it is, as a page.",
    ),
    "reshape": (
        "nmt_moe.cli.reshape:reshape",
        "Verify a checkpoint, or merge or split its files of experts.",
    ),
    "score": (
        "nmt_moe.cli.score:score",
        "Score a translation: BLEU of each kind, chrF, TER.",
    ),
    "serve": ("nmt_moe.cli.serve:serve", "Serve exported models over HTTP, with a page."),
    "sweep": ("nmt_moe.cli.sweep:sweep", "Find alpha and beta of GNMT's search: BLEU over a grid."),
    "translate": ("nmt_moe.cli.translate:translate", "Translate text with an exported model."),
    "verify": ("nmt_moe.cli.verify:verify", "Check that an exported model is whole."),
}


class LazyGroup(click.Group):
    """Lists its commands without importing them, so that help needs neither torch nor sacrebleu."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module; None for a name that is not a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write names and lines of the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group("nmt-moe", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="nmt-moe")
def main() -> None:
    """Mixture-of-experts translation: the programs around fairseq's training and search.

    `nmt-moe COMMAND --help` shows a command's options with examples. Mistakes end with one line and
    status 1; NMT_MOE_TRACEBACK=1 shows where they were found.
    """
