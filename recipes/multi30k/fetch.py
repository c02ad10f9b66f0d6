#!/usr/bin/env python3
"""Take files of Multi30k from a folder, or download them, and verify their digests.

The digests are those of the uncompressed text, so that plain and gzipped copies are equally good.
A download that broke off is continued by the next run.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import shutil
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

COMMIT = "a3d2e0d26b56f3846f66a952536ffed4e401d05a"
ADDRESS = f"https://raw.githubusercontent.com/multi30k/dataset/{COMMIT}/data/task1"
# Where copies keep the files: flat with tok/ beside them, or as in the public repository.
FOLDERS = [".", "raw", "tok", "data/task1/raw", "data/task1/tok"]


def read_digests(path: Path) -> dict[str, str]:
    """Return file name -> sha256 from a file in the form of sha256sum."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {fields[1]: fields[0] for fields in lines if len(fields) == 2}


def find_local(folder: Path, name: str) -> Path:
    candidates = [folder / sub / (name + end) for sub in FOLDERS for end in (".gz", "")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ValueError(f"{folder} has no {name} and no {name}.gz, neither itself nor in raw/ or tok/")


def download(url: str, path: Path) -> None:
    """Fetch `url` into `path`; what an earlier try left is continued if the server can."""
    partial = path.with_name(path.name + ".part")
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as answer,
            partial.open("ab" if answer.status == 206 else "wb") as file,
        ):
            shutil.copyfileobj(answer, file)
    except urllib.error.HTTPError as error:
        # 416: nothing is left to send, the partial file is whole already.
        if error.code != 416:
            raise ValueError(f"{url}: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{url}: {error}. Run again to continue, or set MULTI30K_DIR to a folder that has "
            "the files."
        ) from None
    partial.rename(path)


def read_text(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None


def fetch(name: str, digest: str, target: Path, folder: Path | None, address: str) -> None:
    """Write the text of file `name` into the folder `target`, verified.

    Raises:
        ValueError: the file is missing, cannot be downloaded, or has another digest.
    """
    if folder is None:
        kind, ending = ("tok", "") if ".tok." in name else ("raw", ".gz")
        source = target / f"download.{name}{ending}"
        if not source.exists():
            download(f"{address}/{kind}/{name}{ending}", source)
    else:
        source = find_local(folder, name)
    text = read_text(source)
    found = hashlib.sha256(text).hexdigest()
    if found != digest:
        if folder is None:
            source.unlink()
        raise ValueError(f"{source}: the sha256 of its text is {found}, but must be {digest}")
    (target / name).write_bytes(text)
    if folder is None:
        source.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="names of files, without .gz")
    parser.add_argument("--target", type=Path, required=True, help="folder for the texts")
    parser.add_argument("--folder", type=Path, help="take them from here instead of downloading")
    parser.add_argument(
        "--address", default=ADDRESS, help="where to download from (default: %(default)s)"
    )
    parser.add_argument("--digests", type=Path, default=Path(__file__).with_name("SHA256SUMS"))
    arguments = parser.parse_args()
    try:
        if arguments.folder is not None and not arguments.folder.is_dir():
            raise ValueError(f"MULTI30K_DIR={arguments.folder} is not a folder")
        digests = read_digests(arguments.digests)
        arguments.target.mkdir(parents=True, exist_ok=True)
        for name in arguments.names:
            if name not in digests:
                raise ValueError(f"{arguments.digests} has no digest of {name}")
            fetch(name, digests[name], arguments.target, arguments.folder, arguments.address)
            sys.stdout.write(f"{name}: verified\n")
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
