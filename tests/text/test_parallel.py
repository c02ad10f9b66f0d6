import gzip

import pytest
from click.testing import CliRunner

from nmt_moe.cli import main
from nmt_moe.text.parallel import check_parallel


def write(path, data):
    path.write_bytes(data)
    return path


def test_files_of_equal_length_give_their_number_of_lines(tmp_path):
    first = write(tmp_path / "a.en", b"one\ntwo\n")
    second = write(tmp_path / "a.fr.gz", gzip.compress("un\ndéux\n".encode()))
    assert check_parallel([first, second]) == 2


def test_only_a_line_feed_ends_a_line(tmp_path):
    first = write(tmp_path / "a.en", "one\u2028still one\x85and\x0cone\r\n".encode())
    second = write(tmp_path / "a.fr", b"un\n")
    assert check_parallel([first, second]) == 1


REFUSALS = [
    pytest.param(
        [b"one\ntwo\n", b"un\n"], r"a0` has 2, .*a1` has 1: line 2 is the first", id="unequal"
    ),
    pytest.param(
        [b"one\nt\xffwo\n", b"un\ndeux\n"], r"a0`, line 2 is not valid UTF-8", id="no-utf-8"
    ),
    pytest.param([b"one\n", b"  \n"], r"a1`, line 1 is empty", id="empty-line"),
    pytest.param([b"", b"un\n"], r"a0` has no lines", id="empty-file"),
]


@pytest.mark.parametrize(("contents", "message"), REFUSALS)
def test_a_bad_file_is_named_with_its_line(tmp_path, contents, message):
    files = [write(tmp_path / f"a{i}", content) for i, content in enumerate(contents)]
    with pytest.raises(ValueError, match=message):
        check_parallel(files)


def test_empty_lines_pass_when_allowed(tmp_path):
    assert check_parallel([write(tmp_path / "a", b"\n\n")], allow_empty=True) == 2


def test_the_command_says_how_many_or_what_is_wrong(tmp_path):
    files = [str(write(tmp_path / "a", b"one\n")), str(write(tmp_path / "b", b"un\ndeux\n"))]
    done = CliRunner().invoke(main, ["check-parallel", *files])
    assert done.exit_code == 1
    assert done.stderr.startswith("nmt-moe check-parallel: error: the files must have the same num")
    done = CliRunner().invoke(main, ["check-parallel", files[0]])
    assert done.stdout == "a: number of lines: 1\n"
    done = CliRunner().invoke(main, ["check-parallel", str(tmp_path / "absent")])
    assert "does not exist" in done.stderr
    assert str(tmp_path / "absent") in done.stderr
