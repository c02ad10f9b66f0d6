"""Fixtures for the tests of the shell: tiny binarised corpora and models trained on them."""

from pathlib import Path

import pytest

from tests.support import language_model
from tests.support.commands import call
from tests.support.corpus import preprocess_flags, write_corpus
from tests.support.stock_model import training, write_data
from tests.support.training import TINY_MOE


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binarise a tiny corpus with one dictionary for both languages."""
    folder = tmp_path_factory.mktemp("data")
    call("preprocess", *preprocess_flags(corpus, folder), "--joined-dictionary")
    return folder


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for 8 epochs of 6 updates without interruption, and return the run's folder."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--max-epoch", 8, "--save-interval-updates", 8]
    call("train", data, *TINY_MOE, *flags, "--save-dir", folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(trained: Path) -> Path:
    """Return the checkpoint of a model that has learned a little."""
    return trained / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binarise a text for language models."""
    folder = tmp_path_factory.mktemp("text")
    text = language_model.write_text(folder / "text")
    call("preprocess", *language_model.preprocess_flags(text, folder / "data"))
    return folder / "data"


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a binarised corpus and fairseq's own LSTM after two updates."""
    folder = tmp_path_factory.mktemp("stock")
    write_data(folder, "bin")
    call("train", *training(folder, "models", 2))
    return folder
