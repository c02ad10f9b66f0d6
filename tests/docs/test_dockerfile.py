"""The server's Dockerfile is checked line by line; its image is built if Docker is available."""

import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from nmt_moe.cli.serve import serve
from nmt_moe.diagnostics import known_extras
from tests.support.pages import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return the instructions with their arguments, in the file's order."""
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and line[0] != "#"]


def arguments(name: str) -> list[str]:
    return [value for instruction, value in instructions() if instruction == name]


def copied() -> list[str]:
    return [source for value in arguments("COPY") for source in shlex.split(value)[:-1]]


def test_the_base_image_has_a_python_that_the_project_supports():
    assert arguments("FROM") == ["python:3.11-slim"]


def test_the_server_does_not_run_as_root():
    names = [name for name, _ in instructions()]
    assert arguments("USER") == ["server"]
    assert names.index("RUN") < names.index("USER") < names.index("ENTRYPOINT")


def test_what_is_copied_exists_and_is_not_ignored():
    rules = (REPOSITORY / ".dockerignore").read_text().split()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    for source in copied():
        assert (REPOSITORY / source).exists(), source
        assert any(fnmatch(source, rule) for rule in allowed), source


def test_the_server_is_started_as_its_command_requires():
    [entry] = map(json.loads, arguments("ENTRYPOINT"))
    assert entry[:2] == ["nmt-moe", "serve"]
    options = {option: parameter for parameter in serve.params for option in parameter.opts}
    assert entry[2:] == ["--host", "0.0.0.0"]
    assert "--host" in options
    assert arguments("EXPOSE") == [str(options["--port"].default)]
    [check] = arguments("HEALTHCHECK")
    assert f":{options['--port'].default}/health" in check
    assert "serve" in known_extras()
    assert ".[serve]" in arguments("RUN")[0]


def test_what_is_copied_is_enough_to_build_the_package(tmp_path: Path):
    context = tmp_path / "context"
    context.mkdir()
    for source in copied():
        path = REPOSITORY / source
        if path.is_dir():
            shutil.copytree(path, context / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, context)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "."]
    subprocess.run([*command, "-w", tmp_path], cwd=context, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "nmt_moe/serving/page.html" in names


def has_docker() -> bool:
    if shutil.which("docker") is None:
        return False
    image = arguments("FROM")[0]
    return (
        subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not has_docker(), reason="Docker with the base image is not available")
def test_the_image_builds():
    subprocess.run(["docker", "build", "-t", "nmt-moe-test", REPOSITORY], check=True)
    done = subprocess.run(
        ["docker", "run", "--rm", "nmt-moe-test", "--help"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Usage: nmt-moe serve" in done.stdout
