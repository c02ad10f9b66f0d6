"""The command `nmt-moe` itself: its help, the modules it imports, and its error messages."""

import configparser
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nmt_moe import cli
from nmt_moe.cli import main
from nmt_moe.cli._command import Command, describe_error, list_option, spread_lists
from nmt_moe.cli._paths import Existing, NewFile
from nmt_moe.inference.bundle import CONFIG, read_small


def test_help_names_every_command_and_imports_nothing_heavy():
    heavy = {"torch", "numpy", "sacrebleu", "sentencepiece", "fairseq", "matplotlib"}
    code = (
        "import sys; from nmt_moe.cli import main; main(['--help'], standalone_mode=False); "
        f"print('heavy:', sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "heavy: []" in result.stdout, result.stderr
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_commands_help_gives_examples_and_describes_its_options(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert "\\b" not in result.output  # click's marker for tables must not appear as text
    assert result.exit_code == 0, result.output
    assert re.search(rf"Examples:\n(  .*\n)*  nmt-moe {name}", result.output)
    command = main.get_command(click.Context(main), name)
    assert command.name == name
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, f"{name} {option.opts}"


def test_the_entry_point_of_the_package_is_the_main_command(repository):
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg", encoding="utf-8")
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, _, attribute = target.partition(":")
    assert name == main.name
    assert getattr(importlib.import_module(module), attribute) is main


def failing(error: Exception) -> Command:
    def run() -> None:
        raise error

    return Command("fail", callback=run)


@pytest.mark.parametrize("error", [ValueError("`x` must be 1, but is 2."), OSError("disk full")])
def test_a_mistake_gives_one_line_and_status_1(monkeypatch, error):
    monkeypatch.setattr(main, "get_command", lambda ctx, name: failing(error))
    monkeypatch.delenv("NMT_MOE_TRACEBACK", raising=False)
    result = CliRunner().invoke(main, ["fail"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"nmt-moe fail: error: {error}\n"


def test_the_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setattr(main, "get_command", lambda ctx, name: failing(ValueError("wrong")))
    monkeypatch.setenv("NMT_MOE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        CliRunner().invoke(main, ["fail"], catch_exceptions=False)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(main, "get_command", lambda ctx, name: failing(KeyError("bug")))
    with pytest.raises(KeyError):
        CliRunner().invoke(main, ["fail"], catch_exceptions=False)


def test_an_unknown_command_is_refused():
    result = CliRunner().invoke(main, ["scor"])
    assert result.exit_code == 2
    assert "No such command 'scor'" in result.stderr


def test_a_reader_that_stops_early_ends_the_program_without_a_message(repository):
    command = f"{sys.executable} -m nmt_moe.cli --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=repository)
    assert result.stdout in ("0\n", "1\n")
    assert result.stderr == ""


def test_a_list_option_takes_all_values_that_follow():
    assert spread_lists(["--inputs", "a", "-1", "-", "--x", "b", "c"], {"--inputs"}) == [
        *["--inputs", "a", "--inputs", "-1", "--inputs", "-", "--x", "b", "c"]
    ]
    seen = []
    command = Command("x", params=[], callback=lambda inputs: seen.append(inputs))
    list_option("--inputs", help="files")(command)
    runner = CliRunner()
    assert runner.invoke(command, ["--inputs", "a", "b", "--inputs=c"]).exit_code == 0
    assert seen == [("a", "b", "c")]
    assert "requires an argument" in runner.invoke(command, ["--inputs"]).stderr


def test_a_system_error_names_the_file_and_the_reason():
    missing = FileNotFoundError(2, "No such file or directory", "corpus/missing.en")
    expected = "`corpus/missing.en`: No such file or directory. Check the path."
    assert describe_error(missing) == expected
    assert describe_error(OSError("cut off")) == "cut off"
    assert describe_error(ValueError("`--x` must be 1")) == "`--x` must be 1"


# `FOLDER` stands for a folder that is not a bundle, and `FILE` for a file that exists.
WRONG_PATHS = [
    ("average --inputs no.pt --output a.pt", "`no.pt` does not exist"),
    ("average --inputs FILE --output no/a.pt", "`no/a.pt` must be in a folder that exists"),
    ("check-parallel FILE no", "`no` does not exist"),
    ("experts stats FOLDER --text FILE", "has no `config.json`, so it is not a complete bundle"),
    ("experts stats no --text FILE", "`no` does not exist. Name a folder that `nmt-moe export`"),
    ("experts prune no --num-experts 2 --text FILE --output x", "`no` does not exist. Name a che"),
    ("experts prune FILE --num-experts 2 --text no --output x", "`no` does not exist"),
    ("export no.pt --data FOLDER --output x", "`no.pt` does not exist. Name a checkpoint"),
    ("export FILE --data no --output x", "`no` does not exist. Name a folder that fairseq-prepr"),
    ("export FILE --data FILE --output x", "is a file. Name a folder that fairseq-preprocess"),
    ("export FILE --data FOLDER --pieces no --output x", "`no` does not exist. Check the path."),
    ("hypotheses no", "`no` does not exist"),
    ("lm score FOLDER", "has no `config.json`"),
    ("lm sample no", "`no` does not exist. Name a folder"),
    ("pieces encode --model no", "`no` does not exist"),
    ("pieces encode --model FILE --inputs FOLDER", "is a folder. Check the path."),
    ("pieces encode --model FILE --outputs no/x", "`no/x` must be in a folder that exists"),
    ("pieces train --vocab-size 9 --model m --dictionary d --inputs no", "`no` does not exist"),
    ("plot FILE --output no/x.png", "`no/x.png` must be in a folder that exists. Create `no`"),
    ("report FOLDER --text FILE --output x.html", "has no `config.json`"),
    ("report no --text FILE --output x.html", "`no` does not exist"),
    ("reshape verify FOLDER", "is a folder. Name a checkpoint"),
    ("score no FILE", "`no` does not exist"),
    ("score FILE no", "`no` does not exist"),
    ("serve no=en:de", "`no` does not exist. Name a folder"),
    ("serve FOLDER", "has no `config.json`"),
    ("sweep no", "`no` does not exist"),
    ("translate no", "`no` does not exist. Name a folder"),
    ("translate FILE", "is a file. Name a folder that `nmt-moe export` wrote."),
    ("verify no", "`no` does not exist"),
]
NOTICED_EARLY = """
import json, sys
from click.testing import CliRunner
from nmt_moe.cli import main
results = []
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, line.split())
    results.append([result.exit_code, result.stdout, result.stderr, "torch" in sys.modules])
print(json.dumps(results))
"""


def test_a_wrong_path_gives_one_message_before_torch_is_imported(tmp_path):
    (tmp_path / "file").write_text("a line\n")
    paths = {"FILE": "file", "FOLDER": "."}
    lines = [" ".join(paths.get(word, word) for word in line.split()) for line, _ in WRONG_PATHS]
    command = [sys.executable, "-c", NOTICED_EARLY, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    for (line, message), result in zip(WRONG_PATHS, json.loads(done.stdout), strict=True):
        status, output, error, has_torch = result
        assert (status, output, error.count("\n")) == (1, "", 1), line
        assert re.match(r"nmt-moe [a-z- ]+: error: ", error), line
        assert message in error
        assert not has_torch, line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_path_is_checked_while_the_command_line_is_read():
    for name in cli.COMMANDS:
        command = main.get_command(click.Context(main), name)
        for one in getattr(command, "commands", {"": command}).values():
            for option in one.params:
                if isinstance(option.type, click.Path) and not option.name.startswith("output"):
                    assert isinstance(option.type, (Existing, NewFile)), (name, option.name)


def test_the_command_and_the_library_give_the_same_message_for_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="Name a folder") as caught:
            read_small(path, CONFIG)
        result = CliRunner().invoke(main, ["verify", str(path)])
        assert result.stderr == f"nmt-moe verify: error: {caught.value}\n"


def test_a_pipe_is_accepted_as_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert Existing("file").convert(str(tmp_path / "pipe"), None, None) == tmp_path / "pipe"
    assert NewFile().convert(os.devnull, None, None) == Path(os.devnull)
