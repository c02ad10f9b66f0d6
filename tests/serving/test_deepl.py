"""DeepL's API works with DeepL's own client, and refuses unsupported options."""

import deepl
import httpx
import pytest

from nmt_moe import Translator
from tests.support.serving import LiveServer, make_service

TEXT = "the big dog sees a red tree"


@pytest.fixture
def client(server: LiveServer) -> deepl.DeepLClient:
    return deepl.DeepLClient("any key", server_url=server.url)


def test_the_official_client_translates(client: deepl.DeepLClient, translator: Translator):
    expected = [one.text for one in translator.translate([TEXT, "cat"])]
    one = client.translate_text(TEXT, source_lang="AA", target_lang="BB")
    assert (one.text, one.detected_source_lang, one.billed_characters) == (expected[0], "AA", 27)
    several = client.translate_text([TEXT, "cat", " \n", "🙂"], target_lang="BB")
    assert [result.text for result in several] == [*expected, " \n", "🙂"]


def test_the_official_client_translates_html(client: deepl.DeepLClient, translator: Translator):
    [expected] = translator.translate(TEXT)
    found = client.translate_text(f"<b>{TEXT}</b>", target_lang="BB", tag_handling="html")
    assert found.text == f"<b>{expected.text}</b>"


def test_the_official_client_lists_languages_and_usage(multilingual: LiveServer):
    client = deepl.DeepLClient("any key", server_url=multilingual.url)
    codes = ["DE", "EN", "FR"]
    assert [one.code for one in client.get_source_languages()] == codes
    targets = client.get_target_languages()
    assert [one.code for one in targets] == codes
    assert targets[0].name == "German"
    assert targets[0].supports_formality is False
    before = client.get_usage().character.count
    client.translate_text(TEXT, source_lang="EN", target_lang="DE")
    usage = client.get_usage()
    assert usage.character.count == before + len(TEXT)
    assert not usage.any_limit_reached
    query = httpx.get(f"{multilingual.url}/v2/languages", params={"type": "target"})
    assert query.json()[0]["supports_formality"] is False


def test_the_official_client_reports_mistakes(bundle, client: deepl.DeepLClient):
    with pytest.raises(deepl.DeepLException, match="`target_lang` must be one of bb"):
        client.translate_text(TEXT, target_lang="FR")
    with LiveServer(make_service(bundle, keys=("right",))) as server:
        wrong = deepl.DeepLClient("wrong", server_url=server.url)
        with pytest.raises(deepl.AuthorizationException):
            wrong.translate_text(TEXT, target_lang="BB")
        right = deepl.DeepLClient("right", server_url=server.url)
        assert right.translate_text(TEXT, target_lang="BB").text


def test_forms_are_accepted(server: LiveServer, translator: Translator):
    expected = [one.text for one in translator.translate([TEXT, "cat"])]
    content = {"text": [TEXT, "cat"], "target_lang": "bb"}
    answer = httpx.post(f"{server.url}/v2/translate", data=content, timeout=60).json()
    assert [one["text"] for one in answer["translations"]] == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"glossary_id": "x"}, "`glossary_id` must be left out"),
        ({"custom_instructions": ["x"]}, "`custom_instructions` must be left out"),
        ({"formality": "more"}, "`formality` must be default, prefer_more or prefer_less"),
        ({"tag_handling": "xml"}, "`tag_handling` must be html or left out"),
        ({"source_lang": "bb"}, "`source_lang` must be one of aa"),
        ({"text": 3}, "`text` must be a text or a list of texts"),
    ],
)
def test_unsupported_options_are_named(server: LiveServer, fields: dict, words: str):
    answer = server.post("/v2/translate", {"text": "a", "target_lang": "bb", **fields})
    assert answer.status_code == 400
    assert words in answer.json()["message"]
    assert answer.json()["error"] == answer.json()["message"]
