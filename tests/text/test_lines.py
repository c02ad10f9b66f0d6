"""Lines are counted as by `wc -l` and every other program that reads the file."""

import gzip
import io
import logging
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt_moe.text.lines import (
    MAX_LINE_BYTES,
    BadLine,
    chunk_offsets,
    count_lines,
    read_lines,
    scan_lines,
)

# Other readers drop these characters or treat them as the end of a line.
ODD = "\x0b\x0c\x85\u2028\u2029\ufeff\u00a0\t é猫\U0001f600"
TEXT = st.text(st.sampled_from([*ODD, "a", "b"]), max_size=6)
ENDS = st.sampled_from(["\n", "\r\n"])


def write(folder: Path, content: bytes) -> Path:
    path = folder / "text"
    path.write_bytes(content)
    return path


def wc(path: Path) -> int:
    """Count lines as `wc -l` does, but include a last line without a line feed."""
    printed = subprocess.run(["wc", "-l", path], capture_output=True, check=True).stdout
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    return int(printed.split()[0]) + bool(content and not content.endswith(b"\n"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.tuples(TEXT, ENDS)), last=TEXT, has_mark=st.booleans())
def test_lines_are_those_that_wc_counts(
    folder: Path, lines: list[tuple[str, str]], last: str, has_mark: bool
):
    text = "\ufeff" * has_mark + "".join(line + end for line, end in lines) + last
    path = write(folder, text.encode())
    found = list(read_lines(path))
    assert len(found) == count_lines(path) == wc(path)
    # Without a byte order mark, a U+FEFF at the start of the text is dropped as one.
    wanted = [line for line, _ in lines] + [last] * bool(last)
    if not has_mark and text.startswith("\ufeff"):
        wanted[0] = wanted[0][1:]
        wanted = wanted if text != "\ufeff" else []
    assert found == wanted


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=60))
def test_lines_of_any_bytes_are_counted_as_by_wc(folder: Path, content: bytes):
    path = write(folder, content)
    found = list(scan_lines(io.BytesIO(content), "text"))
    assert len(found) == wc(path)
    for number, line in enumerate(found, start=1):
        if isinstance(line, BadLine):
            assert line.number == number
    # In an accepted file, every reader finds the same lines, with or without universal newlines.
    if not any(isinstance(line, BadLine) for line in found):
        with open(path, encoding="utf-8-sig") as text:
            assert [line.removesuffix("\n") for line in text] == found


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.tuples(TEXT, ENDS)), last=TEXT, num_chunks=st.integers(1, 9))
def test_chunks_hold_each_line_once(
    folder: Path, lines: list[tuple[str, str]], last: str, num_chunks: int
):
    path = write(folder, ("".join(line + end for line, end in lines) + last).encode())
    offsets = chunk_offsets(path, num_chunks)
    assert len(offsets) == num_chunks + 1
    assert offsets == sorted(offsets)
    chunks = [read_lines(path, *ends) for ends in zip(offsets, offsets[1:], strict=False)]
    assert [line for chunk in chunks for line in chunk] == list(read_lines(path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b"ba\xffbe", r"is not valid UTF-8 \(byte 0xff at position 3\)", id="latin"),
        pytest.param(b"\xed\xa0\x80", "is not valid UTF-8", id="surrogate"),
        pytest.param(b"ba\rde", r"contains a carriage return \(byte 3\)", id="return"),
        pytest.param(b"ba\r", "contains a carriage return", id="two-returns-at-the-end"),
        pytest.param(b"ba\x00be", r"contains the control character U\+0000", id="nul"),
        pytest.param(b"\x1c", r"contains the control character U\+001C", id="file-separator"),
        pytest.param(b"\x7f", r"contains the control character U\+007F", id="delete"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: bytes, reason: str):
    path = write(tmp_path, b"ba\nbe\n" + line + b"\r\n")
    with pytest.raises(ValueError, match=rf"`{path}`, line 3 {reason}"):
        list(read_lines(path))


def test_a_file_whose_lines_end_in_carriage_returns_is_named_with_a_remedy(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"line 1 contains a carriage return .* `wc -l`\. .*tr '\\r' '\\n'"
    ):
        count_lines(write(tmp_path, b"ba\rbe\rbi\r"))


def test_text_that_is_cleaned_afterwards_keeps_its_controls(tmp_path: Path):
    path = write(tmp_path, b"a\rb\x00\r\nc\n")
    assert list(read_lines(path, allow_controls=True)) == ["a\rb\x00", "c"]


def test_a_byte_order_mark_is_dropped_and_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = write(tmp_path, b"\xef\xbb\xbfba\nbe\n")
    with caplog.at_level(logging.WARNING):
        assert list(read_lines(path)) == list(read_lines(path)) == ["ba", "be"]
    assert caplog.text.count(f"`{path}` begins with a byte order mark") == 1


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_length_of_a_line_is_limited_and_the_next_line_is_read(end: bytes):
    content = end.join([b"12345", b"123456", b"1" * 200_000, b"last"])
    first, *long, last = scan_lines(io.BytesIO(content), "text", max_bytes=5)
    assert (first, last) == ("12345", "last")
    assert [(line.number, line.reason) for line in long] == [
        (number, "has more than 5 bytes") for number in (2, 3)
    ]


def test_no_more_of_a_long_line_is_kept_than_the_limit(tmp_path: Path):
    path = tmp_path / "text"
    with path.open("wb") as file:
        file.truncate(300_000_000)  # a sparse file, which reads as NUL bytes
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1 has more than 16777216 bytes"):
        count_lines(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    tracemalloc.stop()


def test_a_line_of_a_pipe_is_available_as_soon_as_it_ends(tmp_path: Path):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pipe:
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        lines = scan_lines(pipe.stdout, "standard input")
        for line in ("ba", "be"):
            pipe.stdin.write(f"{line}\n".encode())
            pipe.stdin.flush()
            assert next(lines) == line
        pipe.stdin.close()
        assert list(lines) == []


def test_gzipped_text_is_read_to_the_end_and_its_checksum_compared(tmp_path: Path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"ba\nbe"))
    assert list(read_lines(path)) == ["ba", "be"]
    packed = bytearray(path.read_bytes())
    packed[-6] ^= 1
    for damaged in (packed, packed[:-9], b"ba\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"`{path}` is not a complete compressed file"):
            list(read_lines(path))
