"""In fairseq-interactive, a bad line does not prevent the translation of other lines."""

import io
import sys
from types import SimpleNamespace

import pytest

from nmt_moe.compat import interactive
from tests.support.stock_model import run_apart


def test_a_bad_line_gets_a_message_and_all_others_their_translation(stock):
    lines = [b"a b c", b"", b"d \xff e", b"a " * 5000, "a \u00e9".encode(), b"f f"]
    result = run_apart(
        stock,
        "fairseq_cli.interactive",
        *["bin", "-s", "aa", "-t", "bb", "--path=models/checkpoint_last.pt", "--cpu"],
        *["--buffer-size=4", "--batch-size=2"],
        stdin=b"\n".join(lines) + b"\n",
    )
    assert result.returncode == 0, result.stderr
    output = [line.split("\t") for line in result.stdout.splitlines()]
    assert [fields[0] for fields in output if fields[0][:2] == "H-"] == ["H-0", "H-1", "H-4", "H-5"]
    sources = {fields[0]: fields[1] for fields in output if fields[0][:2] == "S-"}
    assert sources == {"S-0": "a b c", "S-1": "", "S-4": "a <unk>", "S-5": "f f"}
    for message in [
        "line 2 is empty, and so is its translation",
        "line 3 is not valid UTF-8 (byte 0xff at position 3): not translated",
        "line 4 has 5001 tokens, more than the 1024 allowed: not translated",
        "line 5 has tokens that are not in the dictionary: 1 of 3",
    ]:
        assert f"fairseq-interactive: {message}" in result.stderr


def test_lines_are_read_in_buffers_that_know_their_numbers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\r\nb\n\xe9\nd")))
    buffers = list(interactive.buffered_read("-", 2))
    assert buffers == [["a", "b"], [None, "d"]]
    assert [buffer.first_number for buffer in buffers] == [1, 3]
    assert "line 3 is not valid UTF-8 (byte 0xe9 at position 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("max_positions", "max_tokens", "longest"),
    [
        pytest.param((1024, 512), None, 1024, id="the-source-of-a-pair"),
        pytest.param((1024, 512), 100, 100, id="the-limit-of-a-batch"),
        pytest.param({"a-b": (64, 32), "b-c": (128, 8)}, None, 64, id="the-strictest-pair"),
        pytest.param(None, None, float("inf"), id="no-limit"),
    ],
)
def test_the_longest_line_is_what_model_and_batch_allow(max_positions, max_tokens, longest):
    assert interactive.longest_source(max_positions, max_tokens) == longest
