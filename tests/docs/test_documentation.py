"""The documentation builds without warnings, and the README stays short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nmt_moe import __version__
from tests.support.pages import REPOSITORY

for package in ("sphinx", "myst_parser", "furo", "fairseq"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        ["bash", REPOSITORY / "tools/docs.sh", folder],
        env=os.environ | {"NMT_MOE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_options_and_architectures_come_from_the_code(built: Path):
    page = text_of(built / "docs/models.html")
    for word in ("--num-experts N", "noisy_top_k,strictly_balanced", "lstm_moe_lm_100b_131072h"):
        assert word in page
    # For this model, the paper's Table 8 gives 9.7 million operations and 137577.6 million
    # parameters.
    assert re.search(r"lstm_moe_lm_100b_131072h\s+9\.7\s+137,577\.6\s", page)


def test_every_command_has_its_help(built: Path):
    page = text_of(built / "docs/commands.html")
    assert "nmt-moe experts upcycle" in page
    assert "Usage: nmt-moe serve" in page


def test_the_api_has_names_and_docstrings(built: Path):
    page = text_of(built / "docs/api/layer.html")
    assert "MoELayer" in page
    assert "No token is dropped" in page


def test_the_front_page_fits_on_a_few_screens():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_citation_file_gives_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    [paper] = citation["references"]
    assert paper["url"] in (REPOSITORY / "README.md").read_text(encoding="utf-8")
