"""Download files and read archives, verifying their contents and limiting their sizes."""

from __future__ import annotations

import gzip
import lzma
import posixpath
import shutil
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 20
DAMAGE = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)


def show_progress(iterable=None, **options):
    """Return tqdm's bar, updated every second on a terminal and every half minute in a log."""
    from tqdm import tqdm  # imported late, because --dry-run needs only the standard library

    return tqdm(iterable, mininterval=1 if sys.stderr.isatty() else 30, **options)


def download(
    path: Path, addresses: Iterable[str], digest: str | None = None, size: int | None = None
) -> Path:
    """Download a file from the first address that has it, verify it, and return its path.

    Args:
        path: The file to write, which appears once it is complete. An existing file with a
            different digest or size is downloaded again.
        addresses: Addresses of the file: http, https or file.
        digest: Digest of the file, such as `sha256:...` or `md5:...`.
        size: Size of the file in bytes.

    Raises:
        ValueError: if no address works; the message gives the reason for each address.
    """
    import pooch

    path.parent.mkdir(parents=True, exist_ok=True)
    if size is not None and path.is_file() and path.stat().st_size != size:
        path.unlink()
    failures = []
    for address in addresses:
        is_file = address.startswith("file:")
        fetch = copy_file if is_file else pooch.HTTPDownloader(progressbar=True, timeout=60)
        try:
            pooch.retrieve(address, digest, path.name, path.parent, downloader=fetch)
            if size is not None and path.stat().st_size != size:
                found = path.stat().st_size
                path.unlink()
                raise ValueError(f"has {found} bytes, but must have {size}")
        except Exception as error:  # requests, urllib3, http.client and pooch raise their own
            failures.append(f"{address}: {error}")
        else:
            return path
    listed = "\n  ".join(failures)
    raise ValueError(
        f"{path.name} could not be downloaded:\n  {listed}\nRun this again, or name a folder or "
        "mirror that has it (`--help` says how)."
    )


def copy_file(address: str, output: str, _: object) -> None:
    """Copy a file from a `file:` address, as a downloader for pooch."""
    shutil.copyfile(urllib.request.url2pathname(address.removeprefix("file://")), output)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the various errors that a damaged archive causes into a ValueError."""
    try:
        yield
    except tarfile.FilterError as error:
        raise ValueError(f"{path}: the archive is unsafe: {error}") from None
    except DAMAGE as error:
        raise ValueError(f"{path}: the archive is not complete ({error})") from None


def read_members(archive: Path, names: Iterable[str]) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the requested members of a tar archive, without writing any files.

    The archive is read to the end, because its checksum is there.

    Raises:
        ValueError: if the archive is damaged, lacks a requested member, or contains a device, a
            member outside its folder or a link that leaves it.
    """
    missing = set(names)
    opener = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}
    with archive.open("rb") as file:
        start = file.read(2)
    with damage_named(archive), opener.get(start, open)(archive, "rb") as packed:
        with tarfile.open(fileobj=packed, mode="r|") as tar:
            for member in tar:
                tarfile.data_filter(member, str(archive.parent))
                name = posixpath.normpath(member.name)
                if name in missing and member.isreg():
                    missing.remove(name)
                    yield name, tar.extractfile(member)
        # tarfile stops at its own end mark, before the checksum at the end of the gzip file.
        while packed.read(BLOCK):
            pass
    if missing:
        raise ValueError(f"{archive} has no {', '.join(sorted(missing))}")


def bounded(stream: BinaryIO, limit: int, name: str) -> Iterator[bytes]:
    """Yield the blocks of a stream that must end within `limit` bytes.

    Raises:
        ValueError: if the stream is longer.
    """
    total = 0
    while block := stream.read(BLOCK):
        total += len(block)
        if total > limit:
            raise ValueError(
                f"{name} has more than {limit:,} bytes, which is more than the text should have"
            )
        yield block
