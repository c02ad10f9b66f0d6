#!/usr/bin/env python3
"""Download, verify and unpack the text of the One Billion Word benchmark.

The digest is the one that public loaders use, because the benchmark's own page does not give one.
The text is written so that fairseq finds the same words in it as the benchmark. Unlike the
benchmark, fairseq splits words at Unicode white space, so such characters are escaped, for example
as `<U+00A0>`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import click

from nmt_moe.cli import command
from recipes.downloads import bounded, download, read_members

ADDRESS = "https://www.statmt.org/lm-benchmark"
NAME = "1-billion-word-language-modeling-benchmark-r13output"
SHA256 = "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"  # 1,792,209,805 bytes
# Shard 00000 of 100 is held out, and is itself divided into 50 shards.
NUM_TRAIN, NUM_HELD_OUT = 99, 50
# A shard has about 42 MB.
MAX_SHARD_BYTES = 1 << 29
# This matches white space at which fairseq would split a word, and text that looks like an escaped
# character, so that escapes are unambiguous.
CUTS = re.compile(r"[^\S ]|<(?=U\+[0-9A-F]{4}>)")


def train_shard(number: int) -> str:
    """Return the archive path of a training shard, numbered from 1 to 99."""
    return f"{NAME}/training-monolingual.tokenized.shuffled/news.en-{number:05d}-of-00100"


def held_out_shard(number: int) -> str:
    """Return the archive path of a held-out shard, numbered from 0 to 49."""
    return f"{NAME}/heldout-monolingual.tokenized.shuffled/news.en.heldout-{number:05d}-of-00050"


def unpack(archive: Path, names: Sequence[str], target: Path) -> None:
    """Write the files `names` of the archive into the folder `target`, without their folders.

    Raises:
        ValueError: if the archive is truncated or damaged, lacks a file, or contains a file
            that is too large.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name, stream in read_members(archive, names):
        with (target / Path(name).name).open("wb") as file:
            file.writelines(bounded(stream, MAX_SHARD_BYTES, f"{archive}: {name}"))


def join(shards: Sequence[Path], output: Path, num_lines: int) -> None:
    """Write the first `num_lines` lines (0: all) of each shard to `output`, in order.

    Raises:
        ValueError: if there are no lines.
    """
    with output.open("wb") as text:
        for shard in shards:
            with shard.open("rb") as file:
                text.writelines(map(keep_words, islice(file, num_lines or None)))
    if not output.stat().st_size:
        names = ", ".join(shard.name for shard in shards)
        raise ValueError(f"{output} is empty, because its shards are empty: {names}")


def keep_words(line: bytes) -> bytes:
    """Return a line in which fairseq finds exactly the words separated by ASCII white space.

    fairseq also splits words at Unicode white space (U+0085, U+00A0, U+2028, ...), and lines at a
    carriage return. The benchmark has words that contain, or consist of, such characters. Each word
    remains one word, and different words stay different: U+00A0 is written as `<U+00A0>`.
    """
    # Bytes that are not UTF-8 are left to fairseq-preprocess, which names their line.
    words = b" ".join(line.split()).decode(errors="surrogateescape")
    words = CUTS.sub(lambda found: f"<U+{ord(found[0]):04X}>", words)
    return words.encode(errors="surrogateescape") + b"\n"


@command("fetch.py", "fetch.py --folder archive --target text --shards 1 --lines 20000")
@click.option("--folder", type=Path, required=True, help="Folder for the archive.")
@click.option("--target", type=Path, required=True, help="Folder for train, valid and test.")
@click.option("--shards", type=int, default=NUM_TRAIN, help="Training shards to use.")
@click.option("--lines", type=int, default=0, help="Lines to use from each shard; 0 means all.")
@click.option("--address", default=ADDRESS, help="Folder of the archive (LM1B_MIRROR).")
@click.option("--sha256", default=SHA256, help="Digest of the archive (LM1B_SHA256).")
def main(folder: Path, target: Path, shards: int, lines: int, address: str, sha256: str) -> None:
    """Download the benchmark, verify its digest, and write the requested shards."""
    if not 1 <= shards <= NUM_TRAIN:
        raise ValueError(f"SHARDS must be from 1 to {NUM_TRAIN}, but is {shards}")
    archive = folder / f"{NAME}.tar.gz"
    download(archive, [f"{address.rstrip('/')}/{archive.name}"], f"sha256:{sha256}")
    print(f"{archive}: verified")
    # Perplexity is always reported on the first held-out shard; the second is used for validation.
    parts = {
        "train": [train_shard(number) for number in range(1, shards + 1)],
        "valid": [held_out_shard(1)],
        "test": [held_out_shard(0)],
    }
    unpacked = target / "shards"
    unpack(archive, [name for part in parts.values() for name in part], unpacked)
    for part, names in parts.items():
        join([unpacked / Path(name).name for name in names], target / part, lines)
    shutil.rmtree(unpacked)


if __name__ == "__main__":
    main()
