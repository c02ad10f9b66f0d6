"""A tiny text, and the flags of a language model that trains on it in seconds."""

import random
from pathlib import Path

from tests.support.corpus import write_lines

SPLITS = {"train": 120, "valid": 16, "test": 10}

SIZES = ["--model-dim", 16, "--lstm-hidden-dim", 24, "--init-range", 0.3, "--dropout", 0.1]
EXPERTS = ["--num-experts", 4, "--moe-top-k", 2, "--expert-hidden-dim", 16]
# As in the benchmark, each row has one sentence. There are 120 sentences in batches of 24, so an
# epoch has 5 updates.
TEXT = ["--task", "language_modeling", "--sample-break-mode", "eos"]
UPDATES = [
    *["--criterion", "moe_cross_entropy", "--optimizer", "adam", "--lr", 0.02, "--seed", 3],
    *["--lr-scheduler", "warmup_hold_inverse_sqrt", "--warmup-updates", 4, "--hold-updates", 20],
    *["--batch-size", 24, "--num-workers", 0, "--cpu", "--log-format", "json"],
]
TINY_LM = [*TEXT, "--arch", "lstm_moe_lm", *SIZES, *EXPERTS, *UPDATES]
EVALUATE = ["--task", "language_modeling", "--cpu", "--num-workers", 0]


def write_text(folder: Path, seed: int = 1) -> Path:
    """Write `train`, `valid` and `test`, with sentences of 1 to 9 consecutive words."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SPLITS.items():
        starts = [chance.randrange(12) for _ in range(count)]
        write_lines(
            folder / split,
            [
                " ".join(f"w{(start + step) % 12}" for step in range(1 + number % 9))
                for number, start in enumerate(starts)
            ],
        )
    return folder


def preprocess_flags(text: Path, destination: Path) -> list[object]:
    """Return fairseq-preprocess's arguments for the text."""
    prefixes = [f"--{split}pref={text / split}" for split in SPLITS]
    return ["--only-source", *prefixes, "--destdir", destination, "--workers", 1]
