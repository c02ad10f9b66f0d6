#!/usr/bin/env python3
"""Fetch the texts of Multi30k from a folder or the network, and verify their digests.

The digests are computed on the uncompressed text, so copies may be plain or gzipped.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import click

from nmt_moe.cli import command
from recipes.downloads import bounded, damage_named, download

COMMIT = "a3d2e0d26b56f3846f66a952536ffed4e401d05a"
ADDRESS = f"https://raw.githubusercontent.com/multi30k/dataset/{COMMIT}/data/task1"
MAX_BYTES = 1 << 24  # the largest text has 2 MB
# A copy of the data set has its files in these folders; it is flat or has the repository's layout.
FOLDERS = [".", "raw", "tok", "data/task1/raw", "data/task1/tok"]


def read_digests(path: Path) -> dict[str, str]:
    """Return file name -> sha256 from a file in sha256sum's format."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {fields[1]: fields[0] for fields in lines if len(fields) == 2}


def find_local(folder: Path, name: str) -> Path:
    """Return the path of a copy, gzipped or plain."""
    candidates = [folder / sub / (name + end) for sub in FOLDERS for end in (".gz", "")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ValueError(f"{folder} has neither {name} nor {name}.gz, nor do its folders raw/ and tok/")


def read_verified(path: Path, digest: str) -> bytes:
    """Return the text of a file, plain or gzipped.

    Raises:
        ValueError: if the file is damaged or too large, or has another digest.
    """
    with damage_named(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        text = b"".join(bounded(file, MAX_BYTES, str(path)))
    found = hashlib.sha256(text).hexdigest()
    if found != digest:
        raise ValueError(f"{path}: the sha256 of its text is {found}, but must be {digest}")
    return text


def fetch(name: str, digest: str, target: Path, folder: Path | None, address: str) -> None:
    """Verify the text of the file `name`, and write it into the folder `target`.

    Raises:
        ValueError: if the file is missing, cannot be downloaded, or has another digest; a bad
            download is removed, so that the next run downloads it again.
    """
    if folder is not None:
        (target / name).write_bytes(read_verified(find_local(folder, name), digest))
        return
    kind, ending = ("tok", "") if ".tok." in name else ("raw", ".gz")
    source = target / f"download.{name}{ending}"
    try:
        download(source, [f"{address}/{kind}/{name}{ending}"])
        (target / name).write_bytes(read_verified(source, digest))
    finally:
        source.unlink(missing_ok=True)


@command("fetch.py", "fetch.py train.en train.de --target text")
@click.argument("names", nargs=-1, required=True)
@click.option("--target", type=Path, required=True, help="Folder for the texts.")
@click.option("--folder", type=Path, help="Folder that already contains the files (MULTI30K_DIR).")
@click.option("--address", default=ADDRESS, help="Address to download from.")
@click.option(
    "--digests", type=Path, default=Path(__file__).with_name("SHA256SUMS"), help="File of digests."
)
def main(
    names: tuple[str, ...], target: Path, folder: Path | None, address: str, digests: Path
) -> None:
    """Verify the texts NAMES and write them into a folder, without .gz."""
    if folder is not None and not folder.is_dir():
        raise ValueError(f"MULTI30K_DIR={folder} is not a folder")
    known = read_digests(digests)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in known:
            raise ValueError(f"{digests} has no digest for {name}")
        fetch(name, known[name], target, folder, address)
        print(f"{name}: verified")


if __name__ == "__main__":
    main()
