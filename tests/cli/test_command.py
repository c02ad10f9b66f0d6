"""The command `nmt-moe` itself: its help, the time it takes to start, and its error messages."""

import configparser
import importlib
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from nmt_moe import cli
from nmt_moe.cli import main
from nmt_moe.cli._command import Command, describe_error, list_option, spread_lists


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
def test_every_commands_help_describes_it_with_examples(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert "\\b" not in result.output  # click's mark of a table must not appear as text
    assert result.exit_code == 0, result.output
    assert re.search(rf"Examples:\n(  .*\n)*  nmt-moe {name}", result.output)
    command = main.get_command(click.Context(main), name)
    assert command.name == name
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, f"{name} {option.opts}"


def test_the_entry_point_of_the_package_is_the_group(repository):
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
def test_a_mistake_is_one_line_with_status_1(monkeypatch, error):
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


def test_an_error_of_the_system_names_the_file_and_the_reason():
    missing = FileNotFoundError(2, "No such file or directory", "corpus/missing.en")
    expected = "`corpus/missing.en`: No such file or directory. Check the path."
    assert describe_error(missing) == expected
    assert describe_error(OSError("cut off")) == "cut off"
    assert describe_error(ValueError("`--x` must be 1")) == "`--x` must be 1"
