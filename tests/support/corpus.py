"""A tiny translation task, in which each word of a made-up language has one translation."""

import random
from pathlib import Path

SOURCE_WORDS = [first + second for first in "bdfgk" for second in "aeio"]
SPLITS = {"train": 96, "valid": 12, "test": 8}


def translate(sentence: str) -> str:
    """Reverse each word."""
    return " ".join(word[::-1] for word in sentence.split())


def write_corpus(folder: Path, seed: int = 1) -> Path:
    """Write both sides of `train`, `valid` and `test`, with sentences of 1 to 9 words."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SPLITS.items():
        sources = [
            " ".join(chance.choices(SOURCE_WORDS, k=1 + number % 9)) for number in range(count)
        ]
        write_lines(folder / f"{split}.aa", sources)
        write_lines(folder / f"{split}.bb", [translate(source) for source in sources])
    return folder


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def preprocess_flags(corpus: Path, destination: Path) -> list[object]:
    """Return fairseq-preprocess's arguments for the corpus."""
    prefixes = [f"--{split}pref={corpus / split}" for split in SPLITS]
    return ["-s", "aa", "-t", "bb", *prefixes, "--destdir", destination, "--workers", 1]
