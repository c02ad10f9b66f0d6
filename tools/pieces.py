#!/usr/bin/env python3
"""Learn a sentencepiece vocabulary with its fairseq dictionary, and cut text into its pieces.

    pieces.py train --vocab-size 6000 --model spm.model --dictionary dict.txt train.en train.de
    pieces.py encode --model spm.model train.en > train.pieces.en

With --samples, `encode` writes the text again as often, each time cut differently at random
(subword regularisation, Kudo 2018; for unigram models): a model that sees them learns more from
little data. The same seed gives the same text, and both sides of a corpus stay parallel.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece


def train(
    files: list[Path],
    model: Path,
    dictionary: Path,
    vocab_size: int,
    kind: str = "unigram",
    at_most: bool = False,
    character_coverage: float = 1.0,
) -> int:
    """Write the sentencepiece model and the dictionary of its pieces; return how many there are.

    at_most: with less text than `vocab_size` pieces ask for, be content with fewer.
    character_coverage: share of the text's characters that must be pieces; the rarest beyond it
        become unknown.

    Raises:
        ValueError: a file is missing, or the text is too small for so many pieces.
    """
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    try:
        with model.open("wb") as writer:
            sentencepiece.SentencePieceTrainer.train(
                input=[str(path) for path in files],
                model_writer=writer,
                vocab_size=vocab_size,
                model_type=kind,
                character_coverage=character_coverage,
                hard_vocab_limit=not at_most,
                num_threads=1,
                minloglevel=2,
            )
    except RuntimeError as error:
        model.unlink(missing_ok=True)
        # sentencepiece's message begins with its source file and the condition that failed.
        reason = str(error).rpartition("] ")[2]
        raise ValueError(
            f"cannot learn `--vocab-size` {vocab_size} pieces from "
            f"{', '.join(map(str, files))}: {reason}"
        ) from None
    processor = load(model)
    special = {processor.unk_id(), processor.bos_id(), processor.eos_id()}
    pieces = [processor.id_to_piece(i) for i in range(len(processor)) if i not in special]
    # fairseq wants a count beside each entry; it matters only where a dictionary is cut.
    dictionary.write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    return len(pieces)


def load(model: Path) -> sentencepiece.SentencePieceProcessor:
    if not model.is_file():
        raise ValueError(f"{model}: no such file")
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


class WordSampler:
    """Cuts words at random, a unigram model's likelier cuts more often.

    sentencepiece's own sampling cannot be repeated: its seed does not reach its generator. A
    unigram model cuts each word by itself, so drawing word by word is the same distribution.
    """

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, alpha: float, seed: int
    ) -> None:
        self.processor = processor
        self.alpha = alpha
        self.generator = random.Random(seed)
        self.cuts: dict[str, tuple[list[str], list[float]]] = {}

    def __call__(self, line: str) -> str:
        # The pieces joined are the normalised line, each of its words behind a mark.
        words = re.findall("▁[^▁]*|^[^▁]+", "".join(self.processor.encode(line, out_type=str)))
        return " ".join(self.cut(word) for word in words)

    def cut(self, word: str) -> str:
        if word not in self.cuts:
            self.cuts[word] = self.find_cuts(word)
        cuts, cumulative_weights = self.cuts[word]
        return self.generator.choices(cuts, cum_weights=cumulative_weights)[0]

    def find_cuts(self, word: str) -> tuple[list[str], list[float]]:
        """Return the likeliest cuts of a word with the running sums of p ** alpha."""
        plain = word.removeprefix("▁")
        found = self.processor.nbest_encode(plain, nbest_size=64, out_type=str)
        weights = [math.exp(self.alpha * self.log_probability(cut)) for cut in found]
        return [" ".join(cut) for cut in found], list(itertools.accumulate(weights))

    def log_probability(self, pieces: list[str]) -> float:
        """Sum the unigram scores in nats; a piece outside the vocabulary counts nothing."""
        return sum(self.processor.get_score(self.processor.piece_to_id(piece)) for piece in pieces)


def encode(
    file: Path, model: Path, samples: int = 0, alpha: float = 0.2, seed: int = 1
) -> Iterator[str]:
    """Yield the lines of `file` as pieces; then `samples` more passes, cut at random.

    alpha: how much likely cuts are preferred: 0 for not at all.
    """
    processor = load(model)
    with file.open(encoding="utf-8", newline="\n") as text:
        lines = [line.removesuffix("\n") for line in text]
    for line in lines:
        yield " ".join(processor.encode(line, out_type=str))
    sample = WordSampler(processor, alpha, seed)
    for _ in range(samples):
        for line in lines:
            yield sample(line)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="learn a vocabulary")
    train_parser.add_argument("files", nargs="+", type=Path)
    train_parser.add_argument("--model", type=Path, required=True, help="model to write")
    train_parser.add_argument(
        "--dictionary", type=Path, required=True, help="fairseq dictionary to write"
    )
    train_parser.add_argument("--vocab-size", type=int, required=True, help="number of pieces")
    train_parser.add_argument(
        "--type", choices=["unigram", "bpe"], default="unigram", help="kind of model"
    )
    train_parser.add_argument(
        "--at-most", action="store_true", help="accept fewer pieces when there is little text"
    )
    train_parser.add_argument(
        "--character-coverage",
        type=float,
        default=1.0,
        help="share of the text's characters that get a piece (default: %(default)s)",
    )
    encode_parser = commands.add_parser("encode", help="cut text into pieces, to standard output")
    encode_parser.add_argument("file", type=Path)
    encode_parser.add_argument("--model", type=Path, required=True)
    encode_parser.add_argument(
        "--samples", type=int, default=0, help="further passes, cut at random"
    )
    encode_parser.add_argument(
        "--alpha", type=float, default=0.2, help="how much likely cuts are preferred"
    )
    encode_parser.add_argument("--seed", type=int, default=1)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        if arguments.command == "train":
            count = train(
                arguments.files,
                arguments.model,
                arguments.dictionary,
                arguments.vocab_size,
                arguments.type,
                arguments.at_most,
                arguments.character_coverage,
            )
            sys.stdout.write(f"{count} pieces\n")
        else:
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
            for line in encode(
                arguments.file, arguments.model, arguments.samples, arguments.alpha, arguments.seed
            ):
                sys.stdout.write(line + "\n")
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
