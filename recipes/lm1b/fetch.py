#!/usr/bin/env python3
"""Download the One Billion Word benchmark, verify its digest, and unpack the shards asked for.

A download that broke off is continued by the next run. The digest is the one that public loaders
of the archive pin; the benchmark's own page names none.

The text is written so that fairseq finds the benchmark's own words in it: white space of Unicode,
which fairseq cuts at and the benchmark does not, is spelt `<U+00A0>`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.wmt14.download import fetch_from

ADDRESS = "https://www.statmt.org/lm-benchmark"
NAME = "1-billion-word-language-modeling-benchmark-r13output"
SHA256 = "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"  # 1,792,209,805 bytes
# Shard 00000 of 100 was held out, and is itself in 50 shards.
NUM_TRAIN, NUM_HELD_OUT = 99, 50
BLOCK = 1 << 20
# White space that fairseq would cut a word at; and what reads like its name, to keep names unique.
CUTS = re.compile(r"[^\S ]|<(?=U\+[0-9A-F]{4}>)")


def train_shard(number: int) -> str:
    """Give the path in the archive of training shard 1 to 99."""
    return f"{NAME}/training-monolingual.tokenized.shuffled/news.en-{number:05d}-of-00100"


def held_out_shard(number: int) -> str:
    """Give the path in the archive of held-out shard 0 to 49."""
    return f"{NAME}/heldout-monolingual.tokenized.shuffled/news.en.heldout-{number:05d}-of-00050"


def get_archive(folder: Path, address: str, digest: str) -> Path:
    """Give the path of the verified archive, downloaded unless it is there.

    Raises:
        ValueError: it cannot be downloaded or has another digest; then it is removed.
    """
    path = folder / f"{NAME}.tar.gz"
    if not path.exists():
        source, partial = f"{address.rstrip('/')}/{path.name}", path.with_name(path.name + ".part")
        try:
            fetch_from(source, partial, None)  # the digest tells
        except (OSError, HTTPException, ValueError) as error:
            raise ValueError(
                f"{source}: {error}. Run again to continue, or set LM1B_MIRROR to the address of a "
                "folder that has it (file:///... also)."
            ) from None
        partial.rename(path)
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(BLOCK):
            found.update(block)
    if found.hexdigest() != digest:
        size = path.stat().st_size
        path.unlink()
        raise ValueError(
            f"{path}: the sha256 of its {size} bytes is {found.hexdigest()}, but must be {digest}. "
            "It was removed: run again to download it anew."
        )
    return path


def unpack(archive: Path, names: Sequence[str], target: Path) -> None:
    """Write the files `names` of the archive into the folder `target`, without their folders.

    Raises:
        ValueError: the archive is cut off or damaged, lacks a file, or would write elsewhere.
    """
    missing = set(names)
    target.mkdir(parents=True, exist_ok=True)
    try:
        with gzip.open(archive) as packed:
            with tarfile.open(fileobj=packed, mode="r|") as tar:
                for member in tar:
                    if member.name.removeprefix("./") in missing:
                        missing.remove(member.name.removeprefix("./"))
                        member.name = Path(member.name).name
                        tar.extract(member, target, filter="data")
            # tarfile stops at its own end mark, before the checksum at gzip's end.
            while packed.read(BLOCK):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: not a complete archive ({error})") from None
    if missing:
        raise ValueError(f"{archive}: has no {', '.join(sorted(missing))}")


def join(shards: Sequence[Path], output: Path, num_lines: int) -> None:
    """Write the first `num_lines` lines (0: all) of each shard to `output`, in their order.

    Raises:
        ValueError: they have none.
    """
    with output.open("wb") as text:
        for shard in shards:
            with shard.open("rb") as file:
                text.writelines(map(keep_words, islice(file, num_lines or None)))
    if not output.stat().st_size:
        raise ValueError(f"{output} is empty: {', '.join(shard.name for shard in shards)} are")


def keep_words(line: bytes) -> bytes:
    """Give a line whose words, parted at ASCII white space, stay whole wherever fairseq cuts.

    fairseq parts words at Unicode's white space too (U+0085, U+00A0, U+2028, ...), and lines at a
    carriage return. The benchmark has words with, or of nothing but, such characters. Each word
    becomes one word, two different ones stay different: U+00A0 is written `<U+00A0>`.
    """
    # Bytes that are not UTF-8 are left to fairseq-preprocess, which names their line.
    words = b" ".join(line.split()).decode(errors="surrogateescape")
    words = CUTS.sub(lambda found: f"<U+{ord(found[0]):04X}>", words)
    return words.encode(errors="surrogateescape") + b"\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the archive")
    parser.add_argument("--target", type=Path, required=True, help="for train, valid and test")
    parser.add_argument("--shards", type=int, default=NUM_TRAIN, help="training shards to take")
    parser.add_argument("--lines", type=int, default=0, help="of each shard; 0: all")
    parser.add_argument("--address", default=ADDRESS, help="default: %(default)s")
    parser.add_argument("--sha256", default=SHA256, help="of the archive (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        if not 1 <= args.shards <= NUM_TRAIN:
            raise ValueError(f"SHARDS must be from 1 to {NUM_TRAIN}, but is {args.shards}")
        args.folder.mkdir(parents=True, exist_ok=True)
        archive = get_archive(args.folder, args.address, args.sha256)
        print(f"{archive}: verified")
        # Perplexity is reported on the first held-out shard, everywhere; the second is ours.
        parts = {
            "train": [train_shard(number) for number in range(1, args.shards + 1)],
            "valid": [held_out_shard(1)],
            "test": [held_out_shard(0)],
        }
        unpacked = args.target / "shards"
        unpack(archive, [name for part in parts.values() for name in part], unpacked)
        for part, names in parts.items():
            join([unpacked / Path(name).name for name in names], args.target / part, args.lines)
        shutil.rmtree(unpacked)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
