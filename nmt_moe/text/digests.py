"""Write and check SHA-256 digests, stored beside the files in the format of `sha256sum -c`."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path


def compute_sha256(path: Path) -> str:
    """Return a file's digest in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(digests: Path, files: Iterable[Path]) -> None:
    """Write the digests of files in the same folder as `digests`."""
    lines = [f"{compute_sha256(file)}  {file.name}\n" for file in files]
    digests.write_text("".join(lines), encoding="utf-8")


def check_digests(digests: Path, writer: str, way_out: str) -> None:
    """Compare files with their digests, if both exist. Unchanged files are read only once.

    Args:
        digests: The file that `write_digests` wrote.
        writer: The program that wrote the files, for error messages.
        way_out: Advice on how to get intact files, for error messages.

    Raises:
        ValueError: if a file differs; the message names it.
    """
    if not digests.is_file():
        return
    # Accept any bytes, because a damaged digest simply differs from the right one.
    for line in digests.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = digests.parent / Path(name).name
        if not file.is_file():
            continue
        status = file.stat()
        if _compute_once(file, status.st_size, status.st_mtime_ns) != digest:
            raise ValueError(
                f"`{file}` is damaged: it does not match the digest that {writer} stored in "
                f"`{digests}`. {way_out} If you replaced it yourself, remove `{digests.name}`."
            )


@lru_cache(maxsize=1024)
def _compute_once(file: Path, size: int, mtime_ns: int) -> str:
    return compute_sha256(file)
