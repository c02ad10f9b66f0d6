"""`nmt-moe pieces`: learn sentence pieces and apply them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from nmt_moe.cli._command import Group, command, list_option, standard_input
from nmt_moe.cli._paths import FILE, FILE_OR_INPUT, NEW_FILE
from nmt_moe.text import pieces as lib
from nmt_moe.text.lines import BadLine, open_output, read_lines, scan_lines
from nmt_moe.text.outputs import check_outputs

logger = logging.getLogger(__name__)

MODEL = click.option("--model", type=FILE, required=True, help="The sentencepiece model.")
INPUTS = list_option(
    "--inputs",
    "--input",
    type=FILE_OR_INPUT,
    default=["-"],
    help="Texts (default: standard input).",
)
OUTPUTS = list_option(
    "--outputs",
    "--output",
    type=NEW_FILE,
    default=["-"],
    help="Files to write, one for each input (default: standard output).",
)


@click.group(
    "pieces",
    cls=Group,
    examples="""
nmt-moe pieces train --vocab-size 6000 --model spm.model --dictionary dict.txt \\
    --inputs train.en train.de
nmt-moe pieces encode --model spm.model --inputs train.en --outputs pieces/train.en
nmt-moe pieces decode --model spm.model < translation.pieces > translation.de
""",
)
def pieces() -> None:
    """Learn a vocabulary of sentence pieces, split text into them, and join them again."""


@command(
    "train",
    """
nmt-moe pieces train --vocab-size 6000 --model spm.model --dictionary dict.txt \\
    --inputs train.en train.de
""",
)
@list_option("--inputs", "--input", type=FILE, required=True, help="Texts, one sentence per line.")
@click.option("--model", type=NEW_FILE, required=True, help="Model to write.")
@click.option("--dictionary", type=NEW_FILE, required=True, help="fairseq dictionary to write.")
@click.option("--vocab-size", type=int, required=True, help="Number of pieces.")
@click.option(
    "--model-type",
    type=click.Choice(["unigram", "bpe"]),
    default="unigram",
    show_default=True,
    help="Kind of model.",
)
@click.option(
    "--hard-vocab-limit/--no-hard-vocab-limit",
    default=True,
    show_default=True,
    help="Whether to fail or to learn fewer pieces if there is too little text.",
)
@click.option(
    "--character-coverage",
    type=float,
    default=1.0,
    show_default=True,
    help="Share of the text's characters that the pieces must cover.",
)
@click.option(
    "--normalization",
    type=click.Choice(lib.NORMALIZATIONS),
    default="nmt_nfkc",
    show_default=True,
    help="How text is normalised before it is split. The first two replace an ellipsis with ... "
    "and a half sign with 1/2; nfc composes letters and their accents; identity changes nothing. "
    "All of them turn white space into spaces.",
)
@click.option(
    "--max-sentence-length",
    type=int,
    default=lib.MAX_SENTENCE_BYTES,
    show_default=True,
    help="Leave out lines longer than this many bytes.",
)
def train(
    inputs: tuple[Path, ...],
    model: Path,
    dictionary: Path,
    vocab_size: int,
    model_type: str,
    hard_vocab_limit: bool,
    character_coverage: float,
    normalization: str,
    max_sentence_length: int,
) -> None:
    """Learn a vocabulary, and write the model and its fairseq dictionary."""
    done = lib.train(
        inputs,
        model,
        dictionary,
        vocab_size,
        model_type=model_type,
        hard_vocab_limit=hard_vocab_limit,
        character_coverage=character_coverage,
        normalization=normalization,
        max_sentence_bytes=max_sentence_length,
    )
    click.echo(f"{done.num_pieces} pieces, {model_type}, normalization {normalization}")
    for reason, count in done.left_out.items():
        click.echo(f"lines left out of training: {count} {reason}", err=True)


@command(
    "encode",
    """
nmt-moe pieces encode --model spm.model --inputs train.en train.de --outputs cut.en cut.de
nmt-moe pieces encode --model spm.model --samples 2 < train.en > cut.en
""",
)
@MODEL
@INPUTS
@OUTPUTS
@click.option(
    "--samples",
    type=int,
    default=0,
    help="Number of additional copies of the text, split at random.",
)
@click.option(
    "--alpha", type=float, default=0.2, help="How strongly to favour likely splits (0.2)."
)
@click.option(
    "--seed",
    type=int,
    default=1,
    help="Random seed for the first text (1). Each further text uses the next integer.",
)
def encode(
    model: Path,
    inputs: tuple[Path, ...],
    outputs: tuple[Path, ...],
    samples: int,
    alpha: float,
    seed: int,
) -> None:
    """Split text into pieces.

    With --samples N, N more copies of the text are split, each differently at random. A model can
    then learn more from little data (subword regularisation, Kudo 2018; for unigram models).
    The same seed gives the same text, and the two sides of a corpus stay parallel.
    """
    processor = lib.load(model)
    for source, target, number in match(inputs, outputs):
        lines = warn_of_pieces(read_text(source), source)
        write_text(lib.encode(lines, processor, samples, alpha, seed + number), target)


@command("decode", "nmt-moe pieces decode --model spm.model < translation.pieces > translation.de")
@MODEL
@INPUTS
@OUTPUTS
def decode(model: Path, inputs: tuple[Path, ...], outputs: tuple[Path, ...]) -> None:
    """Join pieces into text."""
    processor = lib.load(model)
    for source, target, _ in match(inputs, outputs):
        write_text(lib.decode(warn_of_text(read_text(source), source), processor), target)


for subcommand in (train, encode, decode):
    pieces.add_command(subcommand)


def match(inputs: tuple[Path, ...], outputs: tuple[Path, ...]) -> Iterator[tuple[Path, Path, int]]:
    """Yield each input with its output and its number."""
    if len(inputs) != len(outputs):
        raise ValueError(
            f"`--outputs` must name a file for each input (in total {len(inputs)}), but names "
            f"{len(outputs)}."
        )
    standard = Path("-")
    check_outputs(*([path for path in paths if path != standard] for paths in (inputs, outputs)))
    for number, (source, target) in enumerate(zip(inputs, outputs, strict=True)):
        yield source, target, number


def read_text(path: Path) -> Iterator[str]:
    """Yield the lines of a file, or of standard input if `path` is -."""
    if str(path) != "-":
        yield from read_lines(path)
        return
    for line in scan_lines(standard_input(), "standard input"):
        if isinstance(line, BadLine):
            raise ValueError(f"standard input, line {line.number} {line.reason}. {line.advice}")
        yield line


def warn_of_pieces(lines: Iterable[str], path: Path) -> Iterator[str]:
    """Return the lines; warn if most of the first 1000 are already pieces."""
    first, lines = peek(lines)
    if 2 * sum("▁" in line for line in first) > len(first):
        logger.warning(
            "%s: most lines already contain ▁. Has this text already been split into pieces?", path
        )
    return lines


def warn_of_text(lines: Iterable[str], path: Path) -> Iterator[str]:
    """Return the lines; warn if most of the first 1000 are not pieces."""
    first, lines = peek(lines)
    if 2 * sum("▁" in line for line in first if line) < len(first):
        logger.warning("%s: most lines contain no ▁. Is this plain text instead of pieces?", path)
    return lines


def peek(lines: Iterable[str]) -> tuple[list[str], Iterator[str]]:
    """Return the first 1000 lines, and an iterator over all lines."""
    lines = iter(lines)
    first = list(itertools.islice(lines, 1000))
    return first, itertools.chain(first, lines)


def write_text(lines: Iterable[str], path: Path) -> None:
    """Write lines to a file, or to standard output if `path` is -.

    The file appears only once it is complete.
    """
    with open_output(None if str(path) == "-" else path) as file:
        file.writelines(line + "\n" for line in lines)
