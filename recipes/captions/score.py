#!/usr/bin/env python3
"""Turn the loss that fairseq-eval-lm logs into perplexities that do not hang on the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from nmt_moe.cli import command
from nmt_moe.text.lines import read_lines


@dataclass(frozen=True)
class Score:
    """The loss of a text, and over what it is spread."""

    bits: float  # of the whole text
    pieces: int  # with the ends of sentence
    words: int  # what white space parts
    characters: int  # spaces between words, but no ends of line

    def __str__(self) -> str:
        return (
            f"perplexity {2 ** (self.bits / self.pieces):.2f} per piece ({self.pieces:,} with ends "
            f"of sentence), {2 ** (self.bits / self.words):.2f} per word ({self.words:,}), "
            f"{self.bits / self.characters:.4f} bits per character ({self.characters:,})"
        )


def score_text(bits_per_piece: float, num_scored: int, pieces: Path, text: Path) -> Score:
    """Spread a loss over a text of a sentence a line and over its pieces.

    Raises:
        ValueError: the loss is that of another text.
    """
    num_pieces = sum(len(line.split()) + 1 for line in read_lines(pieces))
    if num_scored != num_pieces:
        raise ValueError(
            f"`--scored` must be {num_pieces}, the pieces and ends of sentence of {pieces}, but is "
            f"{num_scored}. Prepare the text again and score it again."
        )
    lines = list(read_lines(text))
    return Score(
        bits=bits_per_piece * num_pieces,
        pieces=num_pieces,
        words=sum(len(line.split()) for line in lines),
        characters=sum(map(len, lines)),
    )


@command("score.py", "score.py --bits 4.39 --scored 90158 --pieces pieces/test --text text/test")
@click.option("--bits", type=float, required=True, help="Loss per piece, to base 2.")
@click.option("--scored", type=int, required=True, help="Pieces, ends of sentence too.")
@click.option("--pieces", type=Path, required=True, help="The text as it was scored.")
@click.option("--text", type=Path, required=True, help="Before it was cut into pieces.")
def main(bits: float, scored: int, pieces: Path, text: Path) -> None:
    """Print perplexity per piece, per word and bits per character.

    One loss, that of all pieces and ends of sentence, is spread over three counts. Only pieces
    count the ends of sentence.
    """
    print(score_text(bits, scored, pieces, text))


if __name__ == "__main__":
    main()
