"""Run fairseq's commands as a user would, or in this process."""

import importlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.support import programs

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = REPOSITORY / "nmt_moe"


@dataclass(frozen=True)
class Output:
    """The result of a command: its exit status and everything it printed or logged."""

    status: int
    text: str

    def lines(self, kind: str) -> dict[int, list[str]]:
        """Return the columns of lines such as `H-3<tab>-0.2<tab>un deux`, by sentence number."""
        rows = [line.split("\t") for line in self.text.splitlines() if line.startswith(f"{kind}-")]
        return {int(row[0][len(kind) + 1 :]): row[1:] for row in rows}

    def hypotheses(self) -> list[str]:
        """Return the translations in the order of the sentences."""
        return [row[-1] for _, row in sorted(self.lines("H").items())]

    def records(self) -> list[dict[str, float]]:
        """Return the entries of a JSON log, with numbers converted from text."""
        entries = [line[line.find('{"') :] for line in self.text.splitlines() if '{"' in line]
        return [{key: float(value) for key, value in json.loads(row).items()} for row in entries]


def run(
    command: str, *arguments: object, cwd: Path, stdin: bytes = b"", is_installed: bool = False
) -> Output:
    """Run a command in its own process, in the folder `cwd`.

    With `is_installed`, use the environment's own program, which takes seconds to import fairseq.
    """
    python = Path(sys.executable) if is_installed else programs.python()
    finished = subprocess.run(
        [python.with_name(f"fairseq-{command}"), *map(str, arguments)],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    return Output(finished.returncode, finished.stdout.decode(errors="replace"))


def call(command: str, *arguments: object, stdin: bytes = b"") -> Output:
    """Run a command in this process, with the plugin registered; exceptions propagate."""
    from fairseq.logging import metrics

    from nmt_moe import plugin

    plugin.register()
    module = importlib.import_module(f"fairseq_cli.{command}")
    metrics.reset()
    printed = io.StringIO()
    arguments = [f"fairseq-{command}", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        redirect_stdout(printed),
        redirect_stderr(printed),
        log_into(printed),
    ):
        module.cli_main()
    return Output(0, printed.getvalue())


@contextmanager
def log_into(stream: io.StringIO) -> Iterator[None]:
    """Copy all log entries to a stream; restore the loggers at the end."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.addHandler(logging.StreamHandler(stream))
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
