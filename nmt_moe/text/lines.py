r"""Read text line by line. The following rules define what a line is and which lines are rejected.

- Only `\n` ends a line. A file therefore has as many lines as `wc -l` counts, plus one if the last
  line does not end with `\n`. In `\r\n`, the carriage return is not part of the line.
- U+0085, U+2028, U+2029, vertical tabs and form feeds are text, like any other white space.
- A byte order mark at the start of a file is dropped, with a warning.
- The following are rejected with an error that names the file and the line: bytes that are not
  UTF-8; a carriage return within a line; NUL and all other ASCII control characters except tab,
  vertical tab and form feed; and lines longer than `MAX_LINE_BYTES`. As a result, all programs
  count the same lines in an accepted file, and a line needs a limited amount of memory.
- A file named `*.gz` or `*.xz` is decompressed and read to its end, so that its checksum is
  verified.
"""

import codecs
import gzip
import logging
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import BinaryIO, TextIO, cast

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 24

CONTROLS = re.compile(rb"[\x00-\x08\x0d-\x1f\x7f]")
SKIPPED_AT_ONCE = 1 << 16

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used.

    Attributes:
        number: Line number, counted from 1.
        reason: Description of the fault, in words that can follow "line 3".
        advice: How to correct the line.
    """

    number: int
    reason: str
    advice: str


def read_lines(
    path: Path,
    start: int = 0,
    end: int | None = None,
    *,
    allow_controls: bool = False,
) -> Iterator[str]:
    """Yield the lines of a file without their line endings.

    Args:
        path: Path of the file.
        start: Byte at which the first line begins, one of `chunk_offsets`; error messages count
            lines from there.
        end: Byte at which the last line ends; None for the whole file.
        allow_controls: Whether to accept control characters and carriage returns, for text that is
            cleaned afterwards.

    Raises:
        ValueError: if a line is rejected (the message names the file, the line and the reason), or
            a compressed file is incomplete.
        OSError: if the file cannot be opened.
    """
    name = os.fspath(path)
    origin = f", counted from byte {start}," if start else ""
    with open_bytes(path) as stream:
        stream.seek(start)
        for line in scan_lines(stream, name, start, end, allow_controls=allow_controls):
            if isinstance(line, BadLine):
                raise ValueError(
                    f"`{name}`, line {line.number}{origin} {line.reason}. {line.advice}"
                )
            yield line


def count_lines(path: Path) -> int:
    """Check all lines of a file, and return their number.

    Raises:
        ValueError, OSError: as in `read_lines`.
    """
    return sum(1 for _ in read_lines(path))


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, and decompress it if its name ends in `.gz` or `.xz`."""
    if os.fspath(path).endswith(".gz"):
        return cast(BinaryIO, gzip.open(path))
    if os.fspath(path).endswith(".xz"):
        return cast(BinaryIO, lzma.open(path))
    return open(path, "rb")


@contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Open a text file for writing; None stands for standard output.

    The file is written under a temporary name in the same folder and gets its final name only when
    it is complete. If writing fails, the temporary file is removed. /dev/null, pipes and similar
    files are written directly.
    """
    if path is None:
        if sys.stdout is None:
            raise ValueError("standard output is closed. Name a file with `--output`.")
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
        yield sys.stdout
        sys.stdout.flush()
        return
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            yield file
        return
    target = os.path.realpath(path)
    part = f"{target}.{os.getpid()}.part"
    try:
        with open(part, "x", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(part, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def scan_lines(
    stream: BinaryIO,
    name: str,
    start: int = 0,
    end: int | None = None,
    *,
    max_bytes: int = MAX_LINE_BYTES,
    allow_controls: bool = False,
) -> Iterator[str | BadLine]:
    """Yield each line of a stream. For a rejected line, yield a `BadLine` and continue.

    A line is yielded as soon as it ends, so the stream may be a terminal or a pipe.

    Args:
        stream: The stream, at the start of a line.
        name: Name of the stream in warnings.
        start: Position of the stream in bytes; a byte order mark is dropped only at 0.
        end: Position in bytes where reading stops, which is the end of a line.
        max_bytes: Maximum length of a line; a longer line is rejected and skipped.
        allow_controls: Whether to accept control characters and carriage returns, for text that is
            cleaned afterwards.

    Raises:
        ValueError: if a compressed file is incomplete.
    """
    try:
        yield from _scan_lines(stream, name, start, end, max_bytes, allow_controls)
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise ValueError(f"`{name}` is not a complete compressed file: {error}.") from error


def _scan_lines(
    stream: BinaryIO, name: str, start: int, end: int | None, max_bytes: int, allow_controls: bool
) -> Iterator[str | BadLine]:
    number = 0
    while end is None or stream.tell() < end:
        raw = stream.readline(max_bytes + 2)
        if not raw:
            return
        number += 1
        content = _without_end(raw)
        if len(content) > max_bytes:
            _skip_to_end(stream, raw)
            yield BadLine(number, f"has more than {max_bytes} bytes", "Break it into sentences.")
            continue
        line = _decode(content, number, allow_controls)
        if number == 1 and start == 0 and raw.startswith(codecs.BOM_UTF8) and isinstance(line, str):
            _warn_of_byte_order_mark(name)
            line = line[1:]
            if raw == codecs.BOM_UTF8:
                return  # the file is empty apart from the mark
        yield line


def in_chunks(lines: Iterable[str | BadLine], size: int) -> Iterator[list[str | BadLine]]:
    """Yield lists of up to `size` lines."""
    source = iter(lines)
    while chunk := list(islice(source, size)):
        yield chunk


def chunk_offsets(path: Path, num_chunks: int) -> list[int]:
    """Divide a file at line boundaries into chunks of about equal size.

    Returns:
        num_chunks + 1 non-decreasing byte offsets, from 0 to the file's size.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        offsets = [0]
        for chunk in range(1, num_chunks):
            # Start one byte earlier, so that a chunk can begin exactly where a line does.
            stream.seek(max(size * chunk // num_chunks - 1, 0))
            _skip_to_end(stream, b"")
            offsets.append(stream.tell() if size else 0)
        return [*offsets, size]


def _without_end(raw: bytes) -> bytes:
    if not raw.endswith(b"\n"):
        return raw
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def _skip_to_end(stream: BinaryIO, raw: bytes) -> None:
    """Read to the end of a line; `raw` is the part that was read last."""
    while not raw.endswith(b"\n"):
        raw = stream.readline(SKIPPED_AT_ONCE)
        if not raw:
            return


def _decode(content: bytes, number: int, allow_controls: bool) -> str | BadLine:
    found = None if allow_controls else CONTROLS.search(content)
    if found is not None:
        return _describe_control(found, number)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadLine(
            number,
            f"is not valid UTF-8 (byte 0x{content[error.start]:02x} at position {error.start + 1})",
            "Convert the file, for instance with iconv -t UTF-8, or correct the line.",
        )


def _describe_control(found: re.Match[bytes], number: int) -> BadLine:
    position = found.start() + 1
    if found[0] == b"\r":
        return BadLine(
            number,
            f"contains a carriage return (byte {position})",
            r"Only a line feed ends a line, as in `wc -l`. Replace the carriage return with a "
            r"space (tr '\r' ' ') or, if carriage returns end the lines of this file, with a line "
            r"feed (tr '\r' '\n').",
        )
    return BadLine(
        number,
        f"contains the control character U+{found[0][0]:04X} (byte {position})",
        r"Remove it, for instance with: tr -d '\000-\010\016-\037\177'.",
    )


@cache
def _warn_of_byte_order_mark(name: str) -> None:
    """Warn about a byte order mark, once for each file."""
    logger.warning("`%s` begins with a byte order mark (U+FEFF), which is dropped", name)
