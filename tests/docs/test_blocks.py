"""Every command block in the README and in `docs/` runs with a tiny text and tiny models."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.support import programs
from tests.support.bundles import LM, make_bundle
from tests.support.pages import REPOSITORY, Block, blocks, pages

pytest.importorskip("fairseq")
# The first test waits for a complete training run, which takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(1800)

# The blocks of this page create the pieces, data, checkpoints and bundle that other pages use.
FIRST = "docs/train.md"
PORT = "5000"  # the server's port in the pages
TEXT = "the a cat dog house tree runs sees big red under with two birds sing"

# These scripts add options to a reader's commands, so that each command takes about a second. If an
# option is given twice, the last value counts.
SHIMS = {
    "fairseq-train": """
sizes=(--cpu --model-dim 16 --lstm-hidden-dim 16 --hidden-dim 32 --max-update 2 --num-workers 0)
[[ " $* " == *" --task "* ]] || sizes+=(--max-update 5 --save-interval-updates 1)  # for averaging
[[ " $* " == *" lstm_gnmt"* ]] || sizes+=(--num-experts 16 --top-k 2)
[[ " $* " != *" --sampled-softmax "* ]] || sizes+=(--sampled-softmax 8)
exec "$PROGRAMS/fairseq-train" "$@" "${sizes[@]}"
""",
    "fairseq-generate": 'exec "$PROGRAMS/fairseq-generate" "$@" --max-len-b 6',
    "nmt-moe": """
[[ "$1 $2" != "pieces train" ]] || set -- "$@" --no-hard-vocab-limit
exec "$PROGRAMS/python" -m nmt_moe.cli "$@"
""",
    "curl": 'exec "$CURL" --silent --fail "$@"',
    "torchrun": """
exec "$PROGRAMS/python" -m torch.distributed.run "$@" --cpu --model-dim 16 --lstm-hidden-dim 16 \\
    --hidden-dim 32 --num-experts 16 --top-k 2 --max-update 2 --num-workers 0
""",
}


def write_corpus(folder: Path) -> None:
    """Write training, validation and test text in English and in two languages derived from it."""
    chance = random.Random(1)
    folder.mkdir()
    for split, count in (("train", 300), ("valid", 12), ("test", 8), ("more", 5)):
        lines = [chance.choices(TEXT.split(), k=chance.randint(2, 7)) for _ in range(count)]
        for language, change in (("en", str), ("de", lambda w: w[::-1]), ("fr", lambda w: w + "e")):
            text = "".join(" ".join(map(change, line)) + "\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text)


def prepare(folder: Path) -> dict[str, str]:
    """Create the files that the pages assume; return the environment for their commands."""
    folder.mkdir(exist_ok=True)
    (folder / "nmt_moe").symlink_to(REPOSITORY / "nmt_moe")  # as in the repository
    write_corpus(folder / "corpus")
    shims = folder / ".bin"
    shims.mkdir()
    for name, body in SHIMS.items():
        (shims / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (shims / name).chmod(0o755)
    return variables(folder)


def variables(folder: Path) -> dict[str, str]:
    python = programs.python()
    return {
        **os.environ,
        "PATH": f"{folder / '.bin'}:{python.parent}:{os.environ['PATH']}",
        "PROGRAMS": str(python.parent),
        "CURL": shutil.which("curl") or "",
        "PYTHON_EXEC": str(python),  # torchrun starts ranks with this program
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }


def run_blocks(page: str, folder: Path, names: dict[str, Any], port: str = PORT) -> None:
    """Run a page's blocks in a folder, in order; Python blocks share their variables."""
    for block in blocks(page):
        if block.reason is None:
            run_block(block, folder, names, port)


def run_block(block: Block, folder: Path, names: dict[str, Any], port: str) -> None:
    code = block.code.replace(f":{PORT}", f":{port}")
    place = f"{block.page}, line {block.line}"
    if block.language == "python":
        before = os.getcwd()
        os.chdir(folder)
        try:
            exec(compile(code, place, "exec"), names)
        finally:
            os.chdir(before)
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env=variables(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, f"{place}\n{code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Follow the page on training as a reader would, in a new folder."""
    folder = tmp_path_factory.mktemp("reader") / "trained"
    prepare(folder)
    run_blocks(FIRST, folder, {})
    return folder


def copy_for(page: str, trained: Path, tmp_path: Path) -> Path:
    """Copy the folder for a page, and add bundles of other kinds unless the page makes them."""
    folder = tmp_path / "folder"
    shutil.copytree(trained, folder, symlinks=True)
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    shutil.copytree(folder / "en-de", folder / "en-de-int8")
    if "--output many\n" not in text:
        shutil.copytree(make_bundle(tmp_path / "many", languages="en de fr")[0], folder / "many")
    if "--output my-language-model\n" not in text:
        shutil.copytree(make_bundle(tmp_path / "lm", LM)[0], folder / "my-language-model")
    return folder


@contextmanager
def serving(folder: Path, *arguments: str):
    """Serve a bundle during the `with` block; yield the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "nmt_moe.cli", "serve", *arguments, "--port", port]
    server = subprocess.Popen(command, cwd=folder, env=variables(folder), stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except URLError:
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


def test_a_reader_trains_and_translates(trained: Path):
    assert len((trained / "test.de").read_text().splitlines()) == 8
    assert (trained / "en-de/README.md").exists()


SERVED = "docs/serving.md"
ALONE = "README.md"  # its readers have not followed any other page
RUN = [
    page
    for page in pages()
    if page not in (FIRST, SERVED, ALONE) and any(block.reason is None for block in blocks(page))
]


def test_the_blocks_of_the_readme_run(trained: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    prepare(folder)
    shutil.copytree(trained / "en-de", folder / "recipes/demo/work/bundle")
    run_blocks(ALONE, folder, {})
    assert (folder / "en-de/README.md").exists()


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page: str, trained: Path, tmp_path: Path):
    run_blocks(page, copy_for(page, trained, tmp_path), {})


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_requests_of_the_page_on_serving_are_answered(trained: Path, tmp_path: Path):
    with serving(trained, "en-de") as port:
        run_blocks(SERVED, tmp_path, {}, port)


def test_every_fairseq_command_loads_the_plugin():
    missing = [
        (block.page, line)
        for page in pages()
        for block in blocks(page)
        for line in block.code.replace("\\\n", "").splitlines()
        if re.search(r"\bfairseq-(train|generate|preprocess|eval-lm) |\bfairseq_cli\.", line)
        and "--user-dir nmt_moe" not in line
        and " ... " not in line
    ]
    assert not missing


def test_blocks_that_are_not_run_say_why():
    reasons = [block.reason for page in pages() for block in blocks(page) if block.reason]
    assert all(len(reason.split()) > 2 for reason in reasons)


def test_a_block_that_fails_is_noticed(tmp_path: Path):
    prepare(tmp_path)
    with pytest.raises(AssertionError, match="page, line 3"):
        run_block(Block("page", 3, "bash", "false | cat\n", None), tmp_path, {}, PORT)
