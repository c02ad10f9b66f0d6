"""A tiny text of spelled-out numbers for the language model recipes."""

import gzip
import lzma
import random
from pathlib import Path


def write_text(folder: Path) -> Path:
    """Write 120 training lines, compressed by gzip, and 20 test lines, compressed by xz."""
    chance = random.Random(1)
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def lines(count: int) -> bytes:
        return "".join(" ".join(chance.choices(digits, k=5)) + "\n" for _ in range(count)).encode()

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.en.gz").write_bytes(gzip.compress(lines(120)))
    (folder / "val.en.xz").write_bytes(lzma.compress(lines(20)))
    return folder
