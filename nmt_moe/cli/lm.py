"""`nmt-moe lm`: score lines of text with a language model, or sample lines from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmt_moe.cli._command import Group, command, standard_input
from nmt_moe.cli._paths import BUNDLE, FILE
from nmt_moe.text.lines import BadLine, in_chunks, open_bytes

if TYPE_CHECKING:
    from nmt_moe.inference import LineScore

COLUMNS = "log_prob\tppl_per_piece\tppl_per_word\tppl_per_character\tpieces\tunknown"
READ_AHEAD = 2048


@click.group(
    "lm",
    cls=Group,
    examples="""
nmt-moe lm score my-language-model < text
nmt-moe lm sample my-language-model --count 5 --prefix 'Once upon a time'
""",
)
def lm() -> None:
    """Score text with an exported language model, or sample text from it."""


@command("score", "nmt-moe lm score my-language-model < text > scores.tsv")
@click.argument("folder", type=BUNDLE)
@click.argument("file", type=FILE, required=False)
def score(folder: Path, file: Path | None) -> None:
    """Print a line of numbers for each line of FILE, or of standard input.

    The numbers are separated by tabs: log-probability in nats; perplexity per piece, per word and
    per character; number of pieces; number of pieces unknown to the model. The end of a line counts
    as one more piece, word or character. At the end, a summary of the whole text is printed on
    standard error. A line that is not text gets a blank line of output and is reported at the end.
    The exit status is then 1.
    """
    from nmt_moe.inference import LanguageModel, total_score
    from nmt_moe.inference.files import describe_faults, scan_stream

    model = LanguageModel.load(folder)
    click.echo(COLUMNS)
    totals, faults = [], []
    with standard_input() if file is None else open_bytes(file) as stream:
        name = "standard input" if file is None else str(file)
        lines, read_ahead = scan_stream(stream, name)
        for chunk in in_chunks(lines, read_ahead):
            scores = iter(model.score([line for line in chunk if isinstance(line, str)]))
            for line in chunk:
                if isinstance(line, BadLine):
                    faults.append(line)
                    click.echo("")
                else:
                    totals.append(next(scores))
                    click.echo(_row(totals[-1]))
    if totals:
        whole = total_score(totals)
        click.echo(
            f"lines: {len(totals)}; perplexity {whole.perplexity_per_piece:.3f} per piece, "
            f"{whole.perplexity_per_word:.3f} per word, {whole.perplexity_per_character:.4f} per "
            f"character; {whole.bits_per_character:.4f} bits per character",
            err=True,
        )
    if faults:
        raise ValueError(f"{name}: {describe_faults(faults)} All other lines were scored.")


def _row(one: LineScore) -> str:
    values = one.log_prob, one.perplexity_per_piece, one.perplexity_per_word
    numbers = "\t".join(f"{value:.4f}" for value in (*values, one.perplexity_per_character))
    return f"{numbers}\t{len(one.pieces)}\t{one.num_unknown}"


@command("sample", "nmt-moe lm sample my-language-model --count 5 --prefix 'Once upon a time'")
@click.argument("folder", type=BUNDLE)
@click.option("--count", default=1, show_default=True, help="Number of lines to sample.")
@click.option("--prefix", default="", help="Text at the start of each line.")
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    help="Divisor of the logits; values below 1 give likelier lines.",
)
@click.option(
    "--max-pieces",
    default=200,
    show_default=True,
    help="Maximum number of pieces in a line; longer lines are cut off.",
)
@click.option(
    "--seed",
    default=1,
    show_default=True,
    help="Seed of the random numbers; the same seed gives the same lines.",
)
def sample(
    folder: Path, count: int, prefix: str, temperature: float, max_pieces: int, seed: int
) -> None:
    """Sample lines from the language model FOLDER."""
    from nmt_moe.inference import LanguageModel

    model = LanguageModel.load(folder)
    options = {"temperature": temperature, "max_pieces": max_pieces, "seed": seed}
    for line in model.sample(count, prefix, **options):  # type: ignore[arg-type]
        click.echo(line)


lm.add_command(score)
lm.add_command(sample)
