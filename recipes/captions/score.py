#!/usr/bin/env python3
"""Turn the loss that fairseq-eval-lm logs into scores per piece, per word and per character."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from nmt_moe.cli import command
from nmt_moe.text.lines import read_lines


@dataclass(frozen=True)
class Score:
    """The loss of a text, and the counts over which it is averaged."""

    bits: float  # for the whole text
    pieces: int  # including end marks
    words: int  # separated by white space
    characters: int  # including spaces between words, but not line breaks

    def __str__(self) -> str:
        return (
            f"perplexity {2 ** (self.bits / self.pieces):.2f} per piece ({self.pieces:,} with end "
            f"marks), {2 ** (self.bits / self.words):.2f} per word ({self.words:,}), "
            f"{self.bits / self.characters:.4f} bits per character ({self.characters:,})"
        )


def score_text(bits_per_piece: float, num_scored: int, pieces: Path, text: Path) -> Score:
    """Average the loss of a text over its pieces, words and characters.

    Raises:
        ValueError: if the loss was computed on a different text.
    """
    num_pieces = sum(len(line.split()) + 1 for line in read_lines(pieces))
    if num_scored != num_pieces:
        raise ValueError(
            f"`--scored` must be {num_pieces}, the pieces and end marks of {pieces}, but is "
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
@click.option("--bits", type=float, required=True, help="Loss per piece, in bits.")
@click.option("--scored", type=int, required=True, help="Number of pieces, including end marks.")
@click.option("--pieces", type=Path, required=True, help="The text in pieces, as scored.")
@click.option("--text", type=Path, required=True, help="The text before it was split into pieces.")
def main(bits: float, scored: int, pieces: Path, text: Path) -> None:
    """Print perplexity per piece and per word, and bits per character.

    The same loss, summed over all pieces and end marks, is divided by three counts; only the
    count of pieces includes the end marks.
    """
    print(score_text(bits, scored, pieces, text))


if __name__ == "__main__":
    main()
