"""A tiny task in three languages: `bb` reverses the words of `aa`, and `cc` capitalises them."""

import random
from pathlib import Path

from tests.support.commands import call
from tests.support.corpus import SOURCE_WORDS, translate, write_lines

LANGUAGES = {"aa": str, "bb": translate, "cc": str.upper}
# bb-cc has no training text, so it is translated zero-shot.
SIZES = {
    "aa-bb": {"train": 96, "valid": 12, "test": 8},
    "aa-cc": {"train": 24, "valid": 6, "test": 6},
    "bb-cc": {"test": 5},
}
PAIRS = "aa-bb,bb-aa,aa-cc,cc-aa"
TASK = ["--task", "translation_multilingual_gnmt", "--lang-pairs", PAIRS]


def write_texts(folder: Path) -> None:
    """Write files named `SPLIT.PAIR.LANGUAGE`, with sentences of 1 to 5 words."""
    chance = random.Random(1)
    for pair, splits in SIZES.items():
        for split, count in splits.items():
            lines = [
                " ".join(chance.choices(SOURCE_WORDS, k=1 + number % 5)) for number in range(count)
            ]
            for language in pair.split("-"):
                write_lines(
                    folder / f"{split}.{pair}.{language}",
                    [LANGUAGES[language](line) for line in lines],
                )


def write_dictionary(path: Path, languages: str = "aa bb cc") -> Path:
    words = [LANGUAGES[language](word) for language in languages.split() for word in SOURCE_WORDS]
    write_lines(path, [f"{word} 1" for word in dict.fromkeys(words)])
    return path


def binarise(texts: Path, destination: Path, pair: str, dictionary: Path, *splits: str) -> None:
    """Run fairseq-preprocess for both directions of a pair."""
    source, target = pair.split("-")
    prefixes = [f"--{split}pref={texts / split}.{pair}" for split in splits or SIZES[pair]]
    call(
        "preprocess",
        *["-s", source, "-t", target, *prefixes, "--srcdict", dictionary, "--tgtdict", dictionary],
        *["--destdir", destination, "--workers", 1],
    )


def make_data(folder: Path) -> Path:
    """Write the texts, binarise them with one dictionary, and return the folder `data`."""
    write_texts(folder)
    dictionary = write_dictionary(folder / "dict.txt")
    for pair in SIZES:
        binarise(folder, folder / "data", pair, dictionary)
    return folder / "data"
