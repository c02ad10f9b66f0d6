"""The program that measures how much of a bundle is read into memory."""

import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.bundle_memory import main


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_table_shows_that_experts_are_read_when_they_are_used(
    monkeypatch: pytest.MonkeyPatch, repository: Path
):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    # With fewer weights, the compiled loops would read all experts at once.
    sizes = ["--experts", "80", "--model-dim", "64", "--hidden-dim", "1024", "--sentences", "200"]
    result = CliRunner().invoke(main, sizes, catch_exceptions=False)
    rows = re.findall(r"^\| (\w+).*\| +(\d+)% \|$", result.output, re.MULTILINE)
    shares = {name: int(share) for name, share in rows}
    assert list(shares) == ["opening", "1", "200"]
    assert shares["opening"] < 30 < shares["1"] < shares["200"] <= 100
