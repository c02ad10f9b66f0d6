"""Downloads that go on where they broke, from the first address that has the file.

file: addresses are read like http ones, so that a folder can be a mirror.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from io import BufferedIOBase
from pathlib import Path

ADDRESS = "https://www.statmt.org"
BLOCK = 1 << 20


def show_progress(iterable=None, **options):
    """Show tqdm's bar: each second on a terminal, each half a minute in a log."""
    from tqdm import tqdm  # not at the top: --dry-run needs the standard library alone

    return tqdm(iterable, mininterval=1 if sys.stderr.isatty() else 30, **options)


def addresses_of(name: str, entry: dict, mirror: str) -> list[str]:
    """Return where to look for an archive, in this order; a mirror given replaces all others."""
    if mirror:
        return [f"{mirror.rstrip('/')}/{name}"]
    return [f"{ADDRESS}/{name}", *entry.get("mirrors", [])]


def open_address(address: str, start: int) -> tuple[BufferedIOBase, int, int | None]:
    """Open a file: or http address at byte `start`.

    Returns:
        The stream, the byte it really starts at (0 if the server cannot continue), and the size of
        the whole file in bytes if it is known.
    """
    if address.startswith("file:"):
        path = Path(urllib.request.url2pathname(address.removeprefix("file://")))
        stream = path.open("rb")
        size = os.fstat(stream.fileno()).st_size
        start = start if start <= size else 0
        stream.seek(start)
        return stream, start, size
    request = urllib.request.Request(address)
    if start:
        request.add_header("Range", f"bytes={start}-")
    answer = urllib.request.urlopen(request, timeout=60)
    start = start if answer.status == 206 else 0
    length = answer.headers.get("Content-Length")
    return answer, start, None if length is None else start + int(length)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def continue_download(address: str, partial: Path) -> None:
    """Bring `partial` to its end from `address`; what is there already is not asked for again.

    Raises:
        OSError: the address cannot be read.
        ValueError: it broke off, or is shorter than what is there.
    """
    try:
        stream, start, size = open_address(address, size_of(partial))
    except urllib.error.HTTPError as error:
        # 416: there is nothing after the bytes that are here, which are all or too many.
        if error.code != 416:
            raise
        told = error.headers.get("Content-Range") or f"*/{size_of(partial)}"
        size = int(told.rpartition("/")[2])
    else:
        with (
            stream,
            # Unbuffered: what has come is there when the process is killed.
            partial.open("ab" if start else "wb", buffering=0) as file,
            show_progress(
                desc=partial.stem, total=size, initial=start, unit="B", unit_scale=True
            ) as progress,
        ):
            while block := stream.read1(BLOCK):
                file.write(block)
                progress.update(len(block))
    have = size_of(partial)
    if size is not None and have > size:
        partial.unlink()
    if size is not None and have != size:
        raise ValueError(f"broke off after {have} of {size} bytes")


def fetch_from(address: str, partial: Path, wanted: int | None) -> None:
    """Download `wanted` bytes (None: as many as there are), again as long as each try brings more.

    Raises:
        OSError: the address cannot be read.
        ValueError: it does not have the whole archive.
    """
    while size_of(partial) != wanted:
        before = size_of(partial)
        try:
            continue_download(address, partial)
            break
        except (OSError, HTTPException, ValueError):
            if size_of(partial) <= before:
                raise
    have = size_of(partial)
    if wanted is not None and have != wanted:
        if have > wanted:
            partial.unlink()
        raise ValueError(f"ends after {have} bytes, but must have {wanted}")


def download(name: str, entry: dict, target: Path, mirror: str) -> None:
    """Download an archive into `target`, by way of `target`.part, which a later run continues.

    Raises:
        ValueError: no address has it whole.
    """
    failures = []
    for address in addresses_of(name, entry, mirror):
        partial = target.with_name(target.name + ".part")
        try:
            fetch_from(address, partial, entry.get("bytes"))
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{address}: {error}")
        else:
            partial.rename(target)
            return
    listed = "\n  ".join(failures)
    raise ValueError(
        f"{name} could not be downloaded:\n  {listed}\nRun again to continue, or set WMT14_MIRROR "
        "to an address (file:///... or http) that has it."
    )
