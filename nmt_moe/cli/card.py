"""`nmt-moe card`: print the costs of an architecture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from nmt_moe.checks import check_range
from nmt_moe.cli._command import command, list_option
from nmt_moe.planning import VOCABULARY, Card, check_known, find_configs, make_card

EXAMPLES = """
nmt-moe card --all
nmt-moe card --arch lstm_moe_lm_4096h lstm_moe_gnmt_2048h --json
"""


@command("card", EXAMPLES)
@list_option("--arch", metavar="NAME...", help="Architectures to describe.")
@click.option("--all", "take_all", is_flag=True, help="Describe all architectures of this project.")
@click.option("--json", "as_json", is_flag=True, help="Print exact numbers as JSON.")
@click.option("--vocab-size", type=int, help="Vocabulary size [793471; for translation, 32000].")
def card(arch: tuple[str, ...], take_all: bool, as_json: bool, vocab_size: int | None) -> None:
    """Print the operations, parameters and memory of an architecture without allocating it.

    The columns (M: millions; GB: 1e9 bytes, with all numbers in float32):

    \b
    ops        multiply-adds of the forward pass for one token: LSTMs with their
               projections, both matrices of each gate that is evaluated (with
               groups: the primary gate and those of the k chosen groups), and
               the experts that receive the token. Biases and attention are not
               counted. As in the paper, the softmax is counted for translation
               models but not for language models.
    params     the weights of these parts, whether evaluated or not, and one bias
               for each gate of an LSTM, without embedding and softmax
    active     the part of params that one token uses
    total      all parameters, including embedding, softmax, attention and the
               second bias that torch gives an LSTM
    weights, gradients, adam, factored
               memory for all parameters, their gradients, the two moments of
               Adam, and the state of --optimizer factored_adam, which keeps one
               number for each row and each column of an expert matrix.
               Activations need additional memory.

    For a translation model, one token means one source token and one target token.

    Architectures are described with their default sizes. For other sizes, use `nmt-moe plan`, which
    accepts the model's options, such as --model-dim.

    Source: Shazeer et al. 2017, sections 5.1-5.4, Tables 7 and 8, Appendix D.
    """  # noqa: D301 - \b keeps the table as it is
    if take_all == bool(arch):
        raise ValueError("give either `--arch` or `--all`")
    if vocab_size is not None:
        check_range("--vocab-size", vocab_size, 1)
    configs = find_configs()
    names = list(configs) if take_all else arch
    check_known(names, list(configs))
    cards = [
        make_card(name, configs[name], vocab_size or VOCABULARY[type(configs[name])])
        for name in names
    ]
    click.echo(
        json.dumps([asdict(card) for card in cards], indent=1) if as_json else lay_out_cards(cards)
    )


def lay_out_cards(cards: Sequence[Card]) -> str:
    """Return the cards as a table."""
    columns = ["architecture", "ops M", "params M", "active M", "total M"]
    columns += ["weights GB", "gradients GB", "adam GB", "factored GB"]
    rows = [columns]
    for card in cards:
        counts = [card.ops, card.params, card.active, card.total]
        sizes = [
            card.weights_bytes,
            card.gradients_bytes,
            card.adam_bytes,
            card.factored_adam_bytes,
        ]
        numbers = [f"{count / 1e6:.1f}" for count in counts]
        rows.append([card.architecture, *numbers, *(f"{size / 1e9:.2f}" for size in sizes)])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows
    )
