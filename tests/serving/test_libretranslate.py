"""LibreTranslate's API: its fields, forms and errors, and LibreTranslate's own client."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from libretranslatepy import LibreTranslateAPI

from nmt_moe import Translator
from tests.support.serving import PATIENCE, LiveServer

TEXT = "the big dog sees a red tree"


def test_a_text_gives_a_text_and_a_list_a_list(server: LiveServer, translator: Translator):
    [first, second] = [one.text for one in translator.translate([TEXT, "cat"])]
    assert server.translate(TEXT) == {"translatedText": first}
    assert server.translate([TEXT, "cat"]) == {"translatedText": [first, second]}
    assert server.translate([]) == {"translatedText": []}


def test_lines_of_a_text_stay_lines(server: LiveServer, translator: Translator):
    [whole] = translator.translate(f"{TEXT}\n\ncat")
    assert server.translate(f"{TEXT}\r\n\r\ncat") == {"translatedText": whole.text}


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\t", "🙂", "123 456", "1.\n\n 🙂\n", "— …"])
def test_text_without_letters_is_unchanged(server: LiveServer, text: str):
    answer = server.translate([text, text], source="auto", alternatives=2)
    assert answer["translatedText"] == [text, text]
    assert answer["alternatives"] == [[], []]


def test_alternatives_are_other_texts_best_first(server: LiveServer, translator: Translator):
    [result] = translator.translate(TEXT, beam_size=5, num_hypotheses=5)
    others = list(dict.fromkeys(result.hypotheses))[1:]
    answer = server.translate(TEXT, alternatives=4)
    assert answer["translatedText"] == result.text
    assert answer["alternatives"] == others
    assert others


def test_forms_are_accepted_like_json(server: LiveServer, translator: Translator):
    [expected] = translator.translate(TEXT)
    fields = {"q": TEXT, "source": "aa", "target": "bb"}
    url = f"{server.url}/translate"
    for options in ({"data": fields}, {"files": {k: (None, v) for k, v in fields.items()}}):
        answer = httpx.post(url, timeout=PATIENCE, **options)
        assert answer.json() == {"translatedText": expected.text}
    several = {**fields, "q": [TEXT, TEXT], "alternatives": "1"}
    answer = httpx.post(url, data=several, timeout=PATIENCE).json()
    assert answer["translatedText"] == [expected.text] * 2
    assert [len(one) for one in answer["alternatives"]] == [1, 1]


def test_languages_and_settings(server: LiveServer, multilingual: LiveServer):
    assert httpx.get(f"{server.url}/languages").json() == [
        {"code": "aa", "name": "Afar", "targets": ["bb"]}
    ]
    assert httpx.get(f"{multilingual.url}/languages").json() == [
        {"code": "de", "name": "German", "targets": ["en", "fr"]},
        {"code": "en", "name": "English", "targets": ["de", "fr"]},
        {"code": "fr", "name": "French", "targets": ["de", "en"]},
    ]
    settings = httpx.get(f"{server.url}/frontend/settings").json()
    assert settings["charLimit"] == 20000
    assert settings["keyRequired"] is False
    assert settings["language"]["target"] == {"code": "bb", "name": "bb"}


def test_a_multilingual_model_translates_between_all_its_languages(
    multilingual: LiveServer, many, translator: Translator
):
    own = Translator.load(many)
    for target in ("de", "fr"):
        [expected] = own.translate(TEXT, target)
        answer = multilingual.translate(TEXT, source="en", target=target)
        assert answer == {"translatedText": expected.text}
    german = "Der Mann steht mit seinem Hund auf der Straße und wartet."
    answer = multilingual.translate([german, TEXT], source="auto", target="fr")
    assert [one["language"] for one in answer["detectedLanguage"]] == ["de", "en"]
    assert answer["detectedLanguage"][0]["confidence"] > 50
    ranks = multilingual.post("/detect", {"q": german}).json()
    assert [one["language"] for one in ranks][0] == "de"
    assert len(ranks) == 3


def test_a_single_language_is_detected_with_no_confidence(server: LiveServer):
    answer = server.translate(TEXT, source="auto")
    assert answer["detectedLanguage"] == {"language": "aa", "confidence": 0.0}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"q": None}, ["`q` must be a text or a list of texts", "null"]),
        ({"q": {"a": 1}}, ["`q` must be a text or a list of texts", "a table"]),
        ({"q": ["a", 1]}, ["`q` must be a text or a list of texts", "a list"]),
        ({"source": "xx"}, ["`source` must be one of aa", "'xx'"]),
        ({"target": "aa"}, ["`target` must be one of bb", "'aa'"]),
        ({"target": 3}, ["`target` must be a language code", "3"]),
        ({"target": "\ud800"}, ["`target` must be"]),
        ({"format": "pdf"}, ["`format` must be text or html"]),
        ({"alternatives": "1"}, ["`alternatives` must be a whole number", "'1'"]),
        ({"alternatives": -1}, ["`alternatives` must be from 0 to 10", "-1"]),
        ({"alternatives": 10**30}, ["`alternatives` must be from 0 to 10"]),
        ({"q": "a\0b"}, ["`q`: text 1 contains the control character U+0000"]),
        ({"q": ["a", "\udc00"]}, ["`q`"]),
        ({"format": "html", "q": "<pre>a&#13;b</pre>"}, ["control character"]),
        ({"q": "a" * 20001}, ["at most 20000 characters", "20001"]),
        ({"q": ["a"] * 129}, ["at most 128 texts", "129"]),
    ],
)
def test_mistakes_are_named(server: LiveServer, fields: dict, words: list[str]):
    content = json.dumps({"q": TEXT, "source": "aa", "target": "bb", **fields}).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/translate", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    for word in words:
        assert word in answer.json()["error"]


def test_a_missing_field_is_named(server: LiveServer):
    answer = server.post("/translate", {"source": "aa", "target": "bb"})
    assert answer.status_code == 400
    assert answer.json()["error"] == "`q` must be a text or a list of texts, but is missing."


def test_the_official_client_works_unchanged(server: LiveServer, translator: Translator):
    client = LibreTranslateAPI(server.url)
    [expected] = translator.translate(TEXT)
    assert client.translate(TEXT, "aa", "bb", timeout=PATIENCE) == expected.text
    assert client.detect(TEXT, timeout=PATIENCE) == [{"language": "aa", "confidence": 0.0}]
    assert client.languages(timeout=PATIENCE)[0]["code"] == "aa"


def test_concurrent_clients_get_their_own_answers(server: LiveServer, translator: Translator):
    texts = [f"{TEXT} {word}" for word in ("cat", "dog", "house", "tree", "runs", "sees")] * 4
    expected = [one.text for one in translator.translate(texts)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: server.translate(text)["translatedText"], texts))
    assert found == expected
