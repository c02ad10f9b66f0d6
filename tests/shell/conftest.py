"""What the shell's tests share: one tiny corpus, binarised, and one model trained on it."""

from pathlib import Path

import pytest

from tests.support.commands import call
from tests.support.corpus import preprocess_flags, write_corpus
from tests.support.training import TINY_MOE


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binarised with one dictionary for both languages."""
    folder = tmp_path_factory.mktemp("data")
    call("preprocess", *preprocess_flags(corpus, folder), "--joined-dictionary")
    return folder


@pytest.fixture(scope="session")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a little: 48 updates."""
    folder = tmp_path_factory.mktemp("checkpoint")
    call("train", data, *TINY_MOE, "--max-epoch", 8, "--no-epoch-checkpoints", "--save-dir", folder)
    return folder / "checkpoint_last.pt"
