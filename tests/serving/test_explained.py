"""The project's own API returns the translator's words, attention and experts."""

import pytest
import torch

from nmt_moe import Translator
from nmt_moe.serving.explanation import find_words, link_words
from tests.support.serving import LiveServer

TEXT = "the big dog sees a red tree"


def test_words_are_joined_pieces_with_punctuation_apart():
    pieces = ["▁Ein", "▁", "Hund", "e", ",", "▁sagt", "'", "s", "▁(", "a", ")."]
    words = find_words(pieces, has_pieces=True, is_spaced=True)
    assert [(word.text, word.space) for word in words] == [
        ("Ein", False),
        ("Hunde", True),
        (",", False),
        ("sagt", True),
        ("'", False),
        ("s", False),
        ("(", True),
        ("a", False),
        (").", False),
    ]
    assert [index for word in words for index in range(word.first, word.last)] == [*range(11)]
    assert find_words([], has_pieces=True, is_spaced=True) == []
    assert [w.text for w in find_words(["a", "."], has_pieces=False, is_spaced=True)] == ["a", "."]
    assert [w.space for w in find_words(["a", "."], has_pieces=False, is_spaced=True)] == [0, 1]
    assert len(find_words(["▁日本", "語"], has_pieces=True, is_spaced=False)) == 2


def test_links_by_hand():
    source = find_words(["▁a", "b", "▁c"], has_pieces=True, is_spaced=True)
    target = find_words(["▁x", "y", "▁z"], has_pieces=True, is_spaced=True)
    attention = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.0, 0.1], [0.0, 0.01, 0.99]])
    # The mean attention of "xy" is 0.3, 0.1 and 0.1, so the shares of "ab" and "c" are 0.8 and 0.2.
    assert link_words(attention, target, source) == [[(0, 0.8), (1, 0.2)], [(1, 0.99)]]


def test_the_answer_is_the_translators_own(server: LiveServer, translator: Translator):
    text = f"{TEXT}\n\ncat 123"
    [expected] = translator.translate(text, num_hypotheses=3, with_experts=True)
    fields = {"texts": [text], "source": "aa", "target": "bb", "alternatives": 2}
    [found] = server.post("/v1/translate", fields).json()["translations"]
    assert found["text"] == expected.text
    assert set(found["alternatives"]) <= set(expected.hypotheses)
    assert (found["source"], found["target"], found["confidence"]) == ("aa", "bb", 100.0)
    assert found["num_experts"] == 6
    assert found["lines"][1] is None
    sentences = [s for line in found["lines"] if line for s in line["sentences"]]
    assert len(sentences) == len(expected.sentences) == 2
    for own, sentence in zip(sentences, expected.sentences, strict=True):
        best = sentence.hypotheses[0]
        assert own["pieces"] == best.pieces
        assert own["source_pieces"] == sentence.pieces
        assert own["alignment"] == best.alignment
        assert own["log_probs"] == pytest.approx(best.log_probs, abs=1e-4)
        for name, experts in (("experts", best.experts), ("source_experts", sentence.experts)):
            ids = [[expert for expert, _ in piece] for piece in own[name]]
            assert ids == [[expert for expert, _ in piece] for piece in experts]
            assert all(sum(gate for _, gate in piece) == pytest.approx(1) for piece in own[name])
        assert len(own["links"]) == len(own["words"])
        for links in own["links"]:
            assert all(0 <= index < len(own["source_words"]) for index, _ in links)
            assert sum(share for _, share in links) <= 1.001


def test_experts_are_left_out_on_request(server: LiveServer):
    fields = {"texts": TEXT, "target": "bb", "experts": False, "beam": 1}
    [found] = server.post("/v1/translate", fields).json()["translations"]
    [sentence] = found["lines"][0]["sentences"]
    assert "experts" not in sentence
    assert "source_experts" not in sentence


def test_a_text_in_the_target_language_is_unchanged(multilingual: LiveServer):
    text = "Der Mann steht mit seinem Hund auf der Straße und wartet."
    fields = {"texts": [text], "target": "de"}
    [found] = multilingual.post("/v1/translate", fields).json()["translations"]
    assert (found["text"], found["source"], found["lines"]) == (text, "de", [None])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"beam": 0}, "`beam` must be from 1 to 20"),
        ({"beam": 2.5}, "`beam` must be a whole number"),
        ({"experts": 1}, "`experts` must be true or false"),
        ({"length_penalty_alpha": -1}, "`length_penalty_alpha` must be from 0 to 10"),
        ({"texts": None}, "`texts` must be a text or a list of texts"),
    ],
)
def test_mistakes_are_named(server: LiveServer, fields: dict, words: str):
    answer = server.post("/v1/translate", {"texts": "a", "target": "bb", **fields})
    assert answer.status_code == 400
    assert words in answer.json()["error"]
