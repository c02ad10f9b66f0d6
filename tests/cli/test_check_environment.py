"""`nmt-moe check-environment` reports the packages that are missing."""

import importlib.metadata
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from nmt_moe.cli import main
from nmt_moe.diagnostics import requirements


@pytest.fixture
def needs(monkeypatch):
    """Return a function that replaces the requirements."""

    def set_needs(*lines: str, python: str = ">=3.11") -> None:
        monkeypatch.setattr(requirements, "read_requirements", lambda: (python, list(lines)))

    return set_needs


def test_a_package_that_is_too_old_is_named(needs, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.5.1+cpu")
    needs("torch>=2.6")
    assert requirements.find_missing(()) == ["torch>=2.6: has 2.5.1+cpu"]
    needs("torch>=2.5")
    assert requirements.find_missing(()) == []


def test_extras_and_markers_are_respected(needs):
    needs('no-such-x; extra == "demo"', 'no-such-y; sys_platform == "plan9"', python=">=9.9")
    python, *others = requirements.find_missing(())
    assert python.startswith("python>=9.9: is 3.")
    assert others == []
    assert requirements.find_missing(("demo",))[1:] == ["no-such-x: not installed"]


def test_requirements_come_from_setup_cfg_or_from_the_installed_package(monkeypatch):
    _, needs = requirements.read_requirements()
    assert "torch>=2.6" in needs
    assert 'num2words; extra == "demo"' in needs
    assert 'triton; extra == "test" and (sys_platform == "linux")' in needs
    installed = SimpleNamespace(metadata={"Requires-Python": ">=3.11"}, requires=["click"])
    monkeypatch.setattr(requirements, "__file__", "/nowhere/nmt_moe/diagnostics/x.py")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    assert requirements.read_requirements() == (">=3.11", ["click"])


def test_missing_packages_and_modules_that_cannot_be_imported_are_named(needs, monkeypatch):
    needs("no-such-x>=1", "no-such-y")
    result = CliRunner().invoke(main, ["check-environment"])
    assert result.exit_code == 1
    assert "\n  no-such-x>=1: not installed\n  no-such-y: not installed\n" in result.stderr
    needs()
    monkeypatch.setattr(requirements, "IMPORTS", ("json", "no_such_module"))
    result = CliRunner().invoke(main, ["check-environment"])
    assert "\n  no_such_module: import failed (ModuleNotFoundError: No module" in result.stderr


def test_an_unknown_extra_is_refused():
    result = CliRunner().invoke(main, ["check-environment", "--extra", "dmo"])
    assert result.exit_code == 1
    assert "`--extra` must be one of 'benchmark', 'demo'" in result.stderr
