"""The choice of the bundle that translates between two languages."""

import shutil
from pathlib import Path

import pytest

from nmt_moe.serving import Models
from nmt_moe.serving.errors import RequestError
from nmt_moe.serving.models import match, name_of


def test_languages_can_be_named(bundle: Path):
    models = Models.open([f"{bundle}=en:de", f"{bundle}=de:en", str(bundle)])
    assert models.sources == ["aa", "de", "en"]
    assert models.targets_of("en") == ["de"]
    assert models.find("de", "en").folder == str(bundle)


def test_two_bundles_for_one_language_pair_are_refused_by_name(bundle: Path, tmp_path: Path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    with pytest.raises(ValueError, match="bundle-float32` and `.*copy` both translate from aa int"):
        Models.open([str(bundle), str(copy)])


def test_a_multilingual_bundle_and_a_bundle_for_one_of_its_pairs_are_refused(
    bundle: Path, many: Path
):
    with pytest.raises(ValueError, match="both translate from en into de"):
        Models.open([str(many), f"{bundle}=en:de"])
    with pytest.raises(ValueError, match="names them itself"):
        Models.open([f"{many}=en:de"])


def test_languages_and_bundles_must_not_be_named_twice(bundle: Path):
    with pytest.raises(ValueError, match="must have two languages, but has en twice"):
        Models.open([f"{bundle}=en:en"])
    with pytest.raises(ValueError, match="at least one bundle"):
        Models.open([])


def test_a_pair_that_is_not_served_is_named(bundle: Path, many: Path):
    models = Models.open([f"{bundle}=nl:en", str(many)])
    with pytest.raises(RequestError, match="nl is not translated into fr, but into en"):
        models.find("nl", "fr")


@pytest.mark.parametrize(
    ("code", "found"), [("EN", "en"), ("en-GB", "en"), ("PT_br", "pt-BR"), ("zh-Hans", "zh")]
)
def test_codes_are_matched_as_clients_write_them(code: str, found: str):
    assert match("target", code, ["en", "pt-BR", "zh"]) == found


def test_names_of_languages():
    assert [name_of(code) for code in ("de", "pt-BR", "zh_Hant", "qq")] == [
        "German",
        "Portuguese (BR)",
        "Chinese (Hant)",
        "qq",
    ]
