"""Live servers with tiny bundles, for all tests that need no special settings."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("fastapi") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from nmt_moe import Translator
    from nmt_moe.inference import Description, SearchDefaults
    from tests.support.bundles import make_bundle
    from tests.support.serving import LiveServer, make_service

    # Translations are kept short to make searches fast.
    SHORT = Description(search=SearchDefaults(beam_size=3, max_len_b=8))

    @pytest.fixture(scope="session")
    def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make_bundle(tmp_path_factory.mktemp("serving"), description=SHORT)[0]

    @pytest.fixture(scope="session")
    def translator(bundle: Path) -> Translator:
        return Translator.load(bundle)

    @pytest.fixture(scope="session")
    def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("many")
        return make_bundle(folder, languages="en de fr", description=SHORT)[0]

    @pytest.fixture(scope="session")
    def server(bundle: Path) -> Iterator[LiveServer]:
        with LiveServer(make_service(bundle)) as live:
            yield live

    @pytest.fixture(scope="session")
    def multilingual(many: Path) -> Iterator[LiveServer]:
        with LiveServer(make_service(many)) as live:
            yield live
