"""The commands `nmt-moe export`, `translate` and `verify`, called as a user would call them."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from nmt_moe import Translator
from nmt_moe.cli import main
from nmt_moe.inference import Description, SearchDefaults
from nmt_moe.text.lines import BadLine
from tests.support.bundles import make_bundle, make_checkpoint

LINES = ["the big dog sees a red tree", "", "cat", "under the house runs the cat"]
DESCRIPTION = Description(search=SearchDefaults(max_len_b=8))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("cli"), description=DESCRIPTION)[0]


@pytest.fixture(scope="module")
def translated(bundle: Path) -> list[str]:
    return [one.text for one in Translator.load(bundle).translate(LINES)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("".join(f"{line}\n" for line in LINES))
    return path


def call(*arguments: object, stdin: str | bytes = b"") -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), input=stdin)


def assert_mistake(result: Result, command: str, *words: str) -> None:
    """Check that a command ended with one message and status 1."""
    assert result.exit_code == 1, result.output
    messages = [row for row in result.stderr.splitlines() if "error:" in row]
    assert len(messages) == 1
    assert messages[0].startswith(f"nmt-moe {command}: error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in messages[0]


def test_standard_input_is_translated_to_standard_output(
    bundle: Path, text: Path, translated: list[str]
):
    content = "".join(f"{line}\n" for line in translated)
    assert call("translate", bundle, stdin=text.read_bytes()).stdout == content
    windows = text.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    assert call("translate", bundle, stdin=windows).stdout == content
    assert call("translate", bundle, stdin=b"").stdout == ""


def test_files_are_translated_one_after_the_other(
    bundle: Path, text: Path, translated: list[str], tmp_path: Path
):
    zipped, output = tmp_path / "text.xz", tmp_path / "out"
    zipped.write_bytes(lzma.compress(text.read_bytes()))
    result = call("translate", bundle, text, zipped, "--output", output, "--progress")
    assert (result.exit_code, result.stdout) == (0, "")
    assert output.read_text().splitlines() == translated * 2
    assert "4/4" in result.stderr  # from the progress bar
    assert call("translate", bundle, text, "--output", output).stderr == ""
    assert output.read_text().splitlines() == translated
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text", "text.xz"]


def test_a_dash_among_files_is_standard_input(bundle: Path, text: Path, translated: list[str]):
    result = call("translate", bundle, text, "-", stdin=text.read_bytes())
    assert result.stdout == "".join(f"{line}\n" for line in translated * 2)


def test_nbest_rows_have_a_line_number_a_score_and_a_text(bundle: Path, text: Path):
    rows = [
        row.split("\t")
        for row in call("translate", bundle, text, "--nbest", 2, "--beam", 4).stdout.splitlines()
    ]
    assert [row[0] for row in rows] == ["1", "1", "2", "3", "3", "4", "4"]
    assert rows[2] == ["2", "0.0000", ""]
    results = Translator.load(bundle).translate(LINES, num_hypotheses=2, beam_size=4)
    assert [row[2] for row in rows] == [text for one in results for text in one.hypotheses]
    wanted = [h.score for one in results for s in one.sentences for h in s.hypotheses]
    assert [float(row[1]) for row in rows if row[2]] == pytest.approx(wanted, abs=1e-4)


def test_jsonl_contains_what_the_library_returns(bundle: Path, text: Path):
    flags = ["--jsonl", "--experts", "--nbest", 2]
    rows = [json.loads(row) for row in call("translate", bundle, text, *flags).stdout.splitlines()]
    results = Translator.load(bundle).translate(LINES, num_hypotheses=2, with_experts=True)
    for number, (row, result) in enumerate(zip(rows, results, strict=True), start=1):
        wanted = json.loads(json.dumps({"line": number, **result.to_dict()}))
        assert row.keys() == wanted.keys()
        assert row["hypotheses"] == wanted["hypotheses"]
        for one, other in zip(row["sentences"], wanted["sentences"], strict=True):
            assert one["pieces"] == other["pieces"]
            assert [[e for e, _ in piece] for piece in one["experts"]] == [
                [e for e, _ in piece] for piece in other["experts"]
            ]
            assert all("experts" in found for found in one["hypotheses"])
    plain = json.loads(call("translate", bundle, "--jsonl", stdin="cat\n").stdout)
    assert "experts" not in plain["sentences"][0]
    assert len(plain["hypotheses"]) == 1


def test_bad_lines_are_named_and_all_others_are_translated(
    bundle: Path, translated: list[str], tmp_path: Path
):
    content = b"the big dog sees a red tree\n\xff\xfe\ncat\na\0b\n\xed\xa0\x80\n"
    wanted = [translated[0], "", translated[2], "", ""]
    result = call("translate", bundle, stdin=content)
    assert result.stdout.splitlines() == wanted
    faults = [
        "standard input: line 2 is not valid UTF-8 (byte 0xff at position 1)",
        "line 4 contains the control character U+0000",
        "line 5 is not valid UTF-8 (byte 0xed",
        "All other lines were translated.",
    ]
    assert_mistake(result, "translate", *faults)
    (tmp_path / "bad").write_bytes(content)
    result = call("translate", bundle, tmp_path / "bad", "--output", tmp_path / "out")
    assert_mistake(result, "translate", f"{tmp_path / 'bad'}: line 2 ", *faults[1:])
    assert (tmp_path / "out").read_text().splitlines() == wanted
    rows = call("translate", bundle, "--jsonl", stdin=content).stdout.splitlines()
    assert json.loads(rows[1]) == {"line": 2, "text": None}
    rows = call("translate", bundle, "--nbest", 1, stdin=content).stdout.splitlines()
    assert rows[1] == "2\t\t"
    many = call("translate", bundle, stdin=b"\xff\n" * 30)
    assert_mistake(many, "translate", "line 10 ", "20 more")


def test_translate_file_writes_a_complete_file_or_none(
    bundle: Path, text: Path, translated: list[str]
):
    translator, output = Translator.load(bundle), text.with_name("out")
    assert translator.translate_file(text, output, progress=False) == 4
    assert output.read_text().splitlines() == translated
    bad = text.with_name("bad")
    bad.write_bytes(b"cat\n\xff\ncat\n")
    with pytest.raises(ValueError, match=r"bad`: line 2 is not valid UTF-8.*has blank lines for"):
        translator.translate_file(bad, output, progress=False)
    assert output.read_text().splitlines() == [translated[2], "", translated[2]]

    class Failing(Translator):
        def translate(self, texts, *arguments, **options):
            if "tree" in "".join(texts):
                raise OSError("a fault in the middle")
            return super().translate(texts, *arguments, **options)

    before = output.read_text()
    text.write_text("cat\ncat\nthe tree\ncat\n")
    failing = Failing.load(bundle)
    with pytest.raises(OSError, match="in the middle"):
        failing.translate_file(text, output, progress=False, read_ahead=1)
    assert output.read_text() == before
    with pytest.raises(ValueError, match="`beam_size` must be"):
        translator.translate_file(text, text.with_name("other"), beam_size=0, progress=False)
    with pytest.raises(FileNotFoundError):
        translator.translate_file(text.with_name("none"), text.with_name("other"))
    assert sorted(path.name for path in text.parent.iterdir()) == ["bad", "out", "text"]


def test_a_file_may_be_its_own_output(bundle: Path, text: Path, translated: list[str]):
    Translator.load(bundle).translate_file(text, text, progress=False)
    assert text.read_text().splitlines() == translated


def test_the_bar_is_on_standard_error(bundle: Path, text: Path, capfd: pytest.CaptureFixture):
    translator = Translator.load(bundle)
    translator.translate_file(text, text.with_name("out"))
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "4/4" in shown.err
    translator.translate_file(text, text.with_name("out"), progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_truncated_compressed_file_gives_one_message(bundle: Path, text: Path, tmp_path: Path):
    content = text.read_bytes() * 50
    for name, damaged in {
        "cut.gz": gzip.compress(content)[:-20],
        "cut.xz": lzma.compress(content)[:-20],
        "other.gz": b"not gzip",
    }.items():
        path = tmp_path / name
        path.write_bytes(damaged)
        result = call("translate", bundle, path, "--output", tmp_path / "out")
        assert_mistake(result, "translate", f"`{path}` is not a complete compressed file")
        assert not (tmp_path / "out").exists()


def test_a_pipe_is_read_and_written_like_a_file(
    bundle: Path, text: Path, translated: list[str], tmp_path: Path
):
    # A user may write `nmt-moe translate en-de <(zcat text.gz)`.
    wanted = "".join(f"{line}\n" for line in translated)
    os.mkfifo(tmp_path / "in")
    with subprocess.Popen(["bash", "-c", 'cat "$0" > "$1"', text, tmp_path / "in"]):
        assert call("translate", bundle, tmp_path / "in").stdout == wanted
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    assert call("translate", bundle, text, "--output", link).exit_code == 0
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == wanted
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        assert call("translate", bundle, text, "--output", tmp_path / "pipe").exit_code == 0
        assert reader.stdout is not None
        assert reader.stdout.read() == wanted
    assert (tmp_path / "pipe").is_fifo()
    assert call("translate", bundle, text, "--output", os.devnull).exit_code == 0
    assert Path(os.devnull).is_char_device()


def test_a_reader_that_stops_early_ends_the_command_without_a_message(bundle: Path):
    command = [sys.executable, "-m", "nmt_moe.cli", "translate", str(bundle), "--beam", "1"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(b"cat\n" * 3000, timeout=240)
    assert process.returncode == 1
    assert errors == b""


@pytest.mark.parametrize("name", ["input", "output"])
def test_closed_streams_are_reported(bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, f"std{name.removesuffix('put')}", None)  # as if the stream were closed
    with pytest.raises(click.ClickException, match=f"standard {name} is closed. Name a file"):
        main(["translate", str(bundle)], standalone_mode=False)


OPTIONS = [
    (["--beam", 0], "`--beam` must be from 1 to 1000, but is 0"),
    (["--nbest", 6], "`--nbest` must be at most the beam size, 5, but is 6. Use a larger beam"),
    (["--nbest", 0], "`--nbest` must be at least 1, but is 0"),
    (["--length-penalty-alpha", "nan"], "`--length-penalty-alpha` must be from 0.0"),
    (["--coverage-penalty-beta", -1], "`--coverage-penalty-beta` must be from 0.0"),
    (["--beam-prune", "inf"], "`--beam-prune` must be from 0.0"),
    (["--batch-tokens", 0], "`--batch-tokens` must be at least 1"),
    (["--threads", 0], "`--threads` must be from 1 to 1024, but is 0"),
    (["--threads", 10**9], "`--threads` must be from 1 to 1024"),
    (["--experts"], "`--experts` needs `--jsonl`"),
    (["--target-lang", "fr"], "`--target-lang` must be one of bb, but is 'fr'"),
]


@pytest.mark.parametrize(("flags", "message"), OPTIONS, ids=[str(o[0]) for o in OPTIONS])
def test_a_bad_option_gives_one_message(
    bundle: Path, text: Path, flags: list[object], message: str, tmp_path: Path
):
    result = call("translate", bundle, text, *flags, "--output", tmp_path / "out")
    assert_mistake(result, "translate", message)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named_before_anything_is_translated(
    bundle: Path, text: Path, tmp_path: Path
):
    for name, wrong in (("none", "does not exist"), (".", "is a folder")):
        result = call("translate", bundle, text, tmp_path / name)
        assert_mistake(result, "translate", wrong)
        assert result.stdout == ""
    result = call("translate", tmp_path / "none", text)
    assert_mistake(result, "translate", f"`{tmp_path / 'none'}` does not exist. Name a folder")
    result = call("translate", bundle, text, "--ensemble", tmp_path)
    assert_mistake(result, "translate", "has no `config.json`")
    result = call("translate", bundle, text, "--output", tmp_path / "no/such/folder")
    assert_mistake(result, "translate", "must be in a folder that exists")
    result = call("translate", bundle, text, "--output", tmp_path)
    assert_mistake(result, "translate", "must be a file to write, but is a folder")


def test_options_request_ensembles_and_languages(
    bundle: Path, text: Path, translated: list[str], tmp_path: Path
):
    twice = call("translate", bundle, text, "--ensemble", bundle)
    assert twice.stdout.splitlines() == translated
    many, _ = make_bundle(tmp_path, languages="aa bb cc", description=DESCRIPTION)
    result = call("translate", many, text)
    assert_mistake(result, "translate", "`--target-lang` must be one of aa, bb, cc, but is missing")
    found = {call("translate", many, text, "--target-lang", name).stdout for name in ("bb", "cc")}
    assert len(found) == 2


def test_verify_says_what_is_complete_and_what_is_not(bundle: Path, tmp_path: Path):
    result = call("verify", bundle)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{bundle}: complete: translation `lstm_moe_gnmt`, float32")
    assert_mistake(call("verify", tmp_path), "verify", "has no `config.json`", "Name a folder")


def test_export_reads_its_options(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    (tmp_path / "scores").write_text("BLEU = 12.3\n")
    flags = ["--data", data, "--pieces", pieces, "--output", tmp_path / "out"]
    search = ["--beam", 3, "--lenpen", 0.6, "--length-penalty-alpha", 0.2]
    text = ["--lowercase", "--scores", tmp_path / "scores", "--dtype", "int8"]
    result = call("export", path, *flags, *search, *text)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'out'}: complete: translation")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["search"]["beam_size"] == 3
    assert config["search"]["length_exponent"] == 0.6
    assert config["search"]["length_penalty_alpha"] == 0.2
    assert (config["text"]["lowercase"], config["dtype"]) == (True, "int8")
    assert "BLEU = 12.3" in (tmp_path / "out/README.md").read_text()
    assert_mistake(call("export", path, *flags), "export", "exists. Specify another output")
    assert call("export", path, *flags, "--overwrite").exit_code == 0
    flags[-1] = tmp_path / "other"
    half = call("export", path, *flags, "--source-lang", "aa")
    assert_mistake(half, "export", "must be set together")
    own = call("export", path, "--data", data, "--target-pieces", pieces, "--output", flags[-1])
    assert_mistake(own, "export", "`--target-pieces` needs `--pieces`")
    (tmp_path / "scores").write_bytes(b"\xff\n")
    bad = call("export", path, *flags, "--scores", tmp_path / "scores")
    assert_mistake(bad, "export", f"`{tmp_path / 'scores'}`, line 1 is not valid UTF-8")
    for flag in ("--beam-prune", "--lenpen"):
        assert_mistake(call("export", path, *flags, flag, "nan"), "export", f"`{flag}` must be")
    assert not (tmp_path / "other").exists()


def test_a_line_that_cannot_be_translated_is_told_apart_from_a_blank_one(bundle: Path):
    results = list(Translator.load(bundle).translate_lines(["", "\ud800"]))
    assert not isinstance(results[0], BadLine)
    assert isinstance(results[1], BadLine)
