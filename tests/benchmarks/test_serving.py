"""The program that measures the server, on a small scale."""

import re
from pathlib import Path

import pytest

from nmt_moe.inference import Description, SearchDefaults
from tests.support.bundles import make_bundle, write_text

pytest.importorskip("fastapi")

from benchmarks.serving import main


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("serving")
    short = Description(search=SearchDefaults(beam_size=3, max_len_b=8))
    bundle, _ = make_bundle(folder, description=short)
    text = write_text(folder / "sentences")
    languages = ["--source", "aa", "--target", "bb", "--threads", "1"]
    return [str(bundle), "--text", str(text), *languages]


def test_each_of_many_requests_gets_its_own_answer(
    arguments: list[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    assert main([*arguments, "--soak", "600", "--soak-requests", "200", "--clients", "8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"200 requests from 8 clients in \d+ s: 0 lost, 0 mixed up", shown)


def test_the_table_has_a_row_for_each_server(
    arguments: list[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    assert main([*arguments, "--rounds", "1", "--requests", "2", "--clients", "4"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^\| (\d+) \| (yes|no) \|", shown, re.MULTILINE) == [
        ("4", "yes"),
        ("4", "no"),
        ("1", "yes"),
        ("1", "no"),
    ]
