#!/usr/bin/env python3
"""Turn the loss that fairseq-eval-lm logs into perplexities that do not hang on the vocabulary.

    score.py --bits 4.39 --scored 90158 --pieces pieces/test --text text/test

Prints perplexity per piece, per word and bits per character: one loss, that of all pieces and ends
of sentence, spread over three counts. Only pieces count the ends of sentence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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


def read_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return [line.removesuffix("\n") for line in file]


def score_text(bits_per_piece: float, num_scored: int, pieces: Path, text: Path) -> Score:
    """Spread a loss over a text of a sentence a line and over its pieces.

    Raises:
        ValueError: the loss is that of another text.
    """
    num_pieces = sum(len(line.split()) + 1 for line in read_lines(pieces))
    if num_scored != num_pieces:
        raise ValueError(
            f"`--scored` must be {num_pieces}, the pieces and ends of sentence of {pieces}, but is "
            f"{num_scored}. Prepare the text again and score it anew."
        )
    lines = read_lines(text)
    return Score(
        bits=bits_per_piece * num_pieces,
        pieces=num_pieces,
        words=sum(len(line.split()) for line in lines),
        characters=sum(map(len, lines)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, required=True, help="loss per piece, to base 2")
    parser.add_argument("--scored", type=int, required=True, help="pieces, ends of sentence too")
    parser.add_argument("--pieces", type=Path, required=True, help="the text as it was scored")
    parser.add_argument("--text", type=Path, required=True, help="before it was cut into pieces")
    args = parser.parse_args(arguments)
    try:
        print(score_text(args.bits, args.scored, args.pieces, args.text))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
