"""The command `nmt-moe report`, called as a user would call it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nmt_moe.cli import main
from nmt_moe.inference import Description, SearchDefaults
from tests.support.bundles import make_bundle

LINES = ["the big dog sees a red tree", "", "cat", "under the house runs the cat"]
SHORT = Description(search=SearchDefaults(max_len_b=6, beam_size=2))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("cli"), description=SHORT)[0]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    return make_bundle(folder, languages="aa bb", description=SHORT)[0]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.aa"
    path.write_text("".join(f"{line}\n" for line in LINES))
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def assert_mistake(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    [message] = [row for row in result.stderr.splitlines() if "error:" in row]
    assert message.startswith("nmt-moe report: error: ")
    for word in words:
        assert word in message


def test_the_page_and_the_json_file_are_written(bundle: Path, text: Path, tmp_path: Path):
    page, dump = tmp_path / "report.html", tmp_path / "report.json"
    result = call(
        bundle, "--text", text, "--reference", text, "--output", page, "--json", dump, "--progress"
    )
    assert result.exit_code == 0, result.output
    assert "3/3" in result.stderr
    assert result.stderr.splitlines()[-2:] == [f"{page}: written", f"{dump}: written"]
    values = json.loads(dump.read_text(encoding="utf-8"))
    assert values["format"] == "nmt_moe report"
    assert values["parts"][0]["part"] == "text.aa"
    assert values["parts"][0]["blank"] == 1
    assert page.read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")
    # A notebook shows the same page.
    from nmt_moe.inspection import render_page

    assert render_page(values) == page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html", "report.json", "text.aa",
    ]  # fmt: skip
    # The same text gives the same values.
    again = tmp_path / "again.json"
    assert call(bundle, "--text", text, "--reference", text, "--json", again).exit_code == 0
    assert again.read_bytes() == dump.read_bytes()


def test_parts_are_named_after_their_target_languages(many: Path, text: Path, tmp_path: Path):
    dump = tmp_path / "report.json"
    languages = ("--target-lang", "aa", "bb")
    result = call(many, "--text", text, "--reference", text, text, *languages, "--json", dump)
    assert result.exit_code == 0, result.output
    parts = json.loads(dump.read_text())["parts"]
    assert [part["part"] for part in parts] == ["aa", "bb"]
    assert all("quality" in part for part in parts)


def test_mistakes_are_named_and_nothing_is_written(
    bundle: Path, many: Path, text: Path, tmp_path: Path
):
    page, short, bad = tmp_path / "report.html", tmp_path / "short", tmp_path / "bad"
    short.write_text("a cat\n")
    bad.write_bytes(b"a\xff\nb\nc\nd\n")
    to_page = ("--output", page)
    assert_mistake(call(bundle, "--text", text), "name a file to write")
    assert_mistake(call(bundle, "--text", tmp_path / "no", *to_page), "no` does not exist")
    assert_mistake(call(tmp_path / "no", "--text", text, *to_page), "no` does not exist")
    assert_mistake(
        call(bundle, "--text", text, "--reference", short, *to_page),
        "must have the same number of lines", "text.aa` has 4", "short` has 1",
    )  # fmt: skip
    assert_mistake(call(bundle, "--text", bad, *to_page), "line 1 is not valid UTF-8")
    assert_mistake(
        call(bundle, "--text", text, text, text, "--target-lang", "a", "b", *to_page),
        "`--target-lang` takes 0 or 1 or 3 values for 3 parts, but was given 2",
    )  # fmt: skip
    assert_mistake(call(many, "--text", text, *to_page), "`--target-lang` must be one of aa, bb")
    assert_mistake(call(bundle, "--text", text, "--output", text), "is named twice")
    assert_mistake(call(bundle, "--text", text, "--json", bundle / "config.json"), "named twice")
    assert_mistake(
        call(bundle, "--text", text, "--output", tmp_path / "no" / "x"), "folder that exists"
    )
    assert_mistake(call(bundle, "--text", text, "--threads", 0, *to_page), "`--threads` must be")
    assert_mistake(
        call(bundle, "--text", text, "--against", tmp_path / "no", *to_page), "does not exist"
    )
    assert text.read_text().splitlines() == LINES
    assert not page.exists()
    result = call(bundle, *to_page)
    assert result.exit_code == 2
    assert "--text" in result.stderr


def test_a_failure_midway_keeps_the_previous_files(text: Path, tmp_path: Path):
    damaged = make_bundle(tmp_path / "damaged", description=SHORT)[0]
    experts = damaged / "experts.decoder.safetensors"
    content = bytearray(experts.read_bytes())
    for position in range(len(content) // 2, len(content), 64):  # noticed when an expert is used
        content[position] ^= 1
    experts.write_bytes(content)
    page, dump = tmp_path / "report.html", tmp_path / "report.json"
    page.write_text("before")
    result = call(damaged, "--text", text, "--output", page, "--json", dump)
    assert_mistake(result, "experts.decoder.safetensors`: expert", "was altered")
    assert page.read_text() == "before"
    assert not dump.exists()
    assert not list(tmp_path.glob("*.part"))
