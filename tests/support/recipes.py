"""Run a recipe's script as a user does, with programs that start quickly."""

import os
import subprocess
from pathlib import Path

from tests.support import programs

RECIPES = Path(__file__).parents[2] / "recipes"


def run_script(
    script: str, *arguments: object, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run `recipes/SCRIPT` in bash, with environment variables given by name."""
    settings = {"NMT_MOE_PYTHON": programs.python(), "OMP_NUM_THREADS": 1} | variables
    return subprocess.run(
        ["bash", RECIPES / script, *map(str, arguments)],
        env=os.environ | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the message of a script that must have refused to continue."""
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr
