#!/usr/bin/env python3
"""Tell what an architecture costs: operations, parameters, memory. Nothing is allocated.

    cost_card.py --all
    cost_card.py --arch lstm_moe_lm_4096h lstm_moe_gnmt_2048h --json

Columns, M for millions, GB for 1e9 bytes, all in float32:

  ops       multiply-adds of the forward pass for a token: LSTMs with their projections, both
            matrices of each gate that is evaluated (with groups: the primary and those of the k
            chosen groups), the experts a token goes to. Biases and the attention's products are
            left out. Language models leave the softmax out, translation has it: so does the paper.
  params    the weights of all of these, evaluated or not, and one bias for each gate of an LSTM;
            without embedding and softmax
  active    those of `params` that one token meets
  total     all numbers that torch keeps: embedding, softmax, attention, and the second bias that
            torch gives an LSTM included
  weights, gradients, adam, factored
            memory of `total`; of the two moments of Adam; of --optimizer factored_adam, which keeps
            of each expert matrix a number for each row and column. Activations come on top.

A translation model's token stands for one source and one target token.

Source: Shazeer et al. 2017, sections 5.1-5.4, Tables 7 and 8, Appendix D.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nmt_moe.nn import GNMTConfig, LSTMLMConfig
from tools.networks import (
    VOCABULARY,
    active_share,
    build_networks,
    choose,
    expert_numbers,
    factored_numbers,
    find_configs,
    kind_of,
    lay_out,
)
from tools.printing import run

BYTES = 4


@dataclass(frozen=True)
class Part:
    """Numbers of one kind of parameter.

    Attributes:
        size: All of them.
        active: Those that one token is multiplied with.
    """

    size: int = 0
    active: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.size + other.size, self.active + other.active)


@dataclass(frozen=True)
class Card:
    """The costs of one architecture; memory in bytes.

    `ops`, `params`, `active` and `total` are the columns above; `parts` are the multiply-adds of
    each part of the network, those left out of `ops` too.
    """

    architecture: str
    vocab_size: int
    ops: int
    params: int
    active: int
    total: int
    parts: dict[str, int]
    weights_bytes: int
    gradients_bytes: int
    adam_bytes: int
    factored_adam_bytes: int


def make_card(architecture: str, config: LSTMLMConfig | GNMTConfig, vocab_size: int) -> Card:
    """Count the parameters of a network that exists on the meta device only."""
    networks = build_networks(config, vocab_size)
    parts: dict[str, Part] = {}
    for network in networks:
        for name, parameter in network.named_parameters():
            if not name.startswith("embedding."):
                kind = kind_of(name)
                share = active_share(name, config)
                size = parameter.numel()
                parts[kind] = parts.get(kind, Part()) + Part(size, round(size * share))
    softmax = vocab_size * config.model_dim
    counted = [parts.get(kind, Part()) for kind in ("LSTM", "gates", "experts")]
    biases = parts.get("LSTM bias", Part()).size
    ops = sum(part.active for part in counted)
    total = sum(part.size for part in parts.values()) + 2 * softmax
    factored = sum(factored_numbers(network) for network in networks)
    return Card(
        architecture=architecture,
        vocab_size=vocab_size,
        ops=ops + (softmax if isinstance(config, GNMTConfig) else 0),
        params=sum(part.size for part in counted) + biases,
        active=ops + biases,
        total=total,
        parts={
            **{kind: part.active for kind, part in parts.items() if kind in PRODUCTS},
            "softmax": softmax,
        },
        weights_bytes=BYTES * total,
        gradients_bytes=BYTES * total,
        adam_bytes=BYTES * 2 * total,
        factored_adam_bytes=BYTES * (factored + 2 * (total - expert_numbers(networks))),
    )


PRODUCTS = ("LSTM", "gates", "experts", "attention")


def layout(cards: Sequence[Card]) -> str:
    """Lay the cards out as a table."""
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
    return lay_out(rows)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--arch", nargs="+", metavar="NAME", help="these architectures")
    choice.add_argument("--all", action="store_true", help="all architectures of this project")
    parser.add_argument("--json", action="store_true", help="print exact numbers as JSON")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="V",
        help="symbols (793471 for language models, 32000 for translation)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        if args.vocab_size is not None and args.vocab_size < 1:
            raise ValueError(f"`--vocab-size` must be at least 1, but is {args.vocab_size}.")
        configs = find_configs()
        names = list(configs) if args.all else args.arch
        choose(names, list(configs))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    cards = [
        make_card(name, configs[name], args.vocab_size or VOCABULARY[type(configs[name])])
        for name in names
    ]
    print(json.dumps([asdict(card) for card in cards], indent=1) if args.json else layout(cards))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
