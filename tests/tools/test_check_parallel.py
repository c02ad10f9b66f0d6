import gzip
import subprocess
import sys

import pytest

from tools import check_parallel


def write(path, data):
    path.write_bytes(data)
    return path


def test_equal_files_give_their_number_of_lines(tmp_path):
    first = write(tmp_path / "a.en", b"one\ntwo\n")
    second = write(tmp_path / "a.fr.gz", gzip.compress("un\ndéux\n".encode()))
    assert check_parallel.check_parallel([first, second]) == 2


def test_only_a_line_feed_ends_a_line(tmp_path):
    first = write(tmp_path / "a.en", "one\u2028still one\x85and\x0cone\r\n".encode())
    second = write(tmp_path / "a.fr", b"un\n")
    assert check_parallel.check_parallel([first, second]) == 1


def test_a_last_line_without_line_feed_counts(tmp_path):
    assert check_parallel.count_good_lines(write(tmp_path / "a", b"one\ntwo")) == 2


REFUSALS = [
    pytest.param(
        [b"one\ntwo\n", b"un\n"], r"a0 has 2, .*a1 has 1: line 2 is the first", id="unequal"
    ),
    pytest.param(
        [b"one\nt\xffwo\n", b"un\ndeux\n"], r"a0: line 2, byte 2: not UTF-8", id="no-utf-8"
    ),
    pytest.param([b"one\n", b"  \n"], r"a1: line 1 is empty", id="empty-line"),
    pytest.param([b"", b"un\n"], r"a0: the file has no lines", id="empty-file"),
]


@pytest.mark.parametrize(("contents", "message"), REFUSALS)
def test_a_bad_file_is_named_with_its_line(tmp_path, contents, message):
    files = [write(tmp_path / f"a{i}", content) for i, content in enumerate(contents)]
    with pytest.raises(ValueError, match=message):
        check_parallel.check_parallel(files)


def test_empty_lines_pass_when_allowed(tmp_path):
    assert check_parallel.count_good_lines(write(tmp_path / "a", b"\n\n"), allow_empty=True) == 2


def test_a_missing_or_truncated_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent: no such file"):
        check_parallel.count_good_lines(tmp_path / "absent")
    cut = write(tmp_path / "a.gz", gzip.compress(b"one\n" * 1000)[:-9])
    with pytest.raises(ValueError, match=r"a\.gz: not a complete gzip file"):
        check_parallel.count_good_lines(cut)


def test_the_program_ends_with_1_and_the_message_alone(tmp_path):
    files = [write(tmp_path / "a", b"one\n"), write(tmp_path / "b", b"un\ndeux\n")]
    command = [sys.executable, check_parallel.__file__, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the files must have the same number of lines")
    assert "Traceback" not in done.stderr
