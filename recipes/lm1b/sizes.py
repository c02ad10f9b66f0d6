#!/usr/bin/env python3
"""Print the widths of a language model, or one eighth of them, as fairseq-train flags.

All three widths are divided, and the number of experts stays the same. In every model, the
operations and weights of LSTMs and experts therefore shrink to one 64th, and those of gates to one
eighth.
"""

from __future__ import annotations

import click

from nmt_moe.cli import command
from nmt_moe.planning import find_options

WIDTHS = ("model_dim", "lstm_hidden_dim", "hidden_dim")


def narrow_sizes(model: str, divisor: int) -> dict[str, int]:
    """Return the widths of architecture `model`, divided by `divisor`.

    Raises:
        ValueError: if `model` is not one of this project's language models.
    """
    architectures = find_options()
    # This import comes late, because fairseq must be set up first.
    from nmt_moe.models.lstm_moe_lm import LSTMMoELMConfig

    known = [name for name, (options, _) in architectures.items() if options is LSTMMoELMConfig]
    if model not in known:
        raise ValueError(f"MODEL must be one of {', '.join(known)}, but is '{model}'")
    options, args = architectures[model]
    sizes = options(**vars(args))
    return {name: getattr(sizes, name) // divisor for name in WIDTHS}


@command("sizes.py", "sizes.py lstm_moe_lm_32 --divide 8")
@click.argument("model")
@click.option("--divide", type=click.Choice(["1", "8"]), default="1", help="Divisor of the widths.")
def main(model: str, divide: str) -> None:
    """Print the widths of a language model as fairseq-train flags."""
    sizes = narrow_sizes(model, int(divide))
    print(" ".join(f"--{name.replace('_', '-')} {width}" for name, width in sizes.items()))


if __name__ == "__main__":
    main()
