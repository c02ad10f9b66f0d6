"""Reports on tiny bundles: pages are complete, and values agree with the models."""

import html.parser
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nmt_moe import LanguageModel, Translator
from nmt_moe.inference import Description, SearchDefaults
from nmt_moe.inspection import Part, load_model, make_report, render_page
from nmt_moe.inspection.page import MAX_BYTES, direction
from nmt_moe.moe import MoEConfig
from tests.support.bundles import GNMT, LM, WORDS, make_bundle

SHORT = Description(search=SearchDefaults(max_len_b=8, beam_size=3))
HOSTILE = [
    "<script>alert(1)</script> the cat",
    "\"quotes' & <b>tags</b> </style></script> a dog",
    "שלום עולם the cat",
    "👩‍👩‍👧 runs under 😀",
    "{{ 7 * 7 }} {% raw %} the tree",
]
TEXT = ["the big dog sees a red tree", "", "cat", "under the house runs the cat", *HOSTILE]
REFERENCES = ["a dog", "cat", "a red cat", " ", *HOSTILE]


class Reader(html.parser.HTMLParser):
    """A parser that collects a page's contents and checks that every element is closed."""

    VOID = ("meta", "br", "rect", "line")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID or (tag == "rect" and f"{self.get_starttag_text()}"[-2] != "/"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text.append(data)


def check_page(page: str) -> Reader:
    """Check that a page is complete, self-contained and harmless."""
    assert len(page.encode()) < MAX_BYTES
    reader = Reader(page)
    assert not reader.tags.keys() & {"script", "img", "link", "iframe", "object", "form", "base"}
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "style", "action", "xlink:href"), (tag, name)
        if name == "href":
            assert value.startswith("#"), value
            assert value[1:] in reader.ids
    assert not re.search(r"https?://|url\(|@import", page.replace("data:", ""))
    policy = next(v for _, name, v in reader.attributes if name == "content" and "src" in v)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert ("html", "lang", "en") in reader.attributes
    assert len(reader.ids) == len(set(reader.ids))
    return reader


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("report"), description=SHORT)[0]


@pytest.fixture(scope="module")
def report(bundle: Path) -> dict[str, Any]:
    return make_report(bundle, [Part("text", TEXT, REFERENCES, language="bb")])


def test_a_report_read_back_from_json_gives_the_same_page(report: dict[str, Any]):
    again = json.loads(json.dumps(report, allow_nan=False))
    assert render_page(again) == render_page(report)


def test_loads_are_those_of_the_translator(bundle: Path, report: dict[str, Any]):
    translator = Translator.load(bundle)
    kept = [0, 2, 4, 5, 6, 7, 8]
    scores = translator.score(
        [TEXT[n] for n in kept], [REFERENCES[n] for n in kept], with_experts=True
    )
    routings = {
        "encoder": [one.routing for one in scores],
        "decoder": [one.target.routing for one in scores],
    }
    assert [layer["layer"] for layer in report["layers"]] == ["encoder", "decoder"]
    for layer in report["layers"]:
        own: list[Any] = routings[layer["layer"]]
        load = torch.cat([one.expert_ids.flatten() for one in own]).bincount(minlength=6)
        assert layer["usage"]["load"] == load.tolist()
        assert layer["parts"][0]["load"] == load.tolist()
        largest = max(float(one.gates.max()) for one in own)
        found = [c["gate"] for expert in layer["experts"] for c in expert["contexts"]]
        assert max(found) == pytest.approx(largest, abs=1e-5)
        for expert in layer["experts"]:
            gates = [context["gate"] for context in expert["contexts"]]
            assert gates == sorted(gates, reverse=True)
            assert expert["load"] == load[expert["expert"]]
    [part] = report["parts"]
    assert (part["lines"], part["blank"], part["sentences"]) == (9, 2, 7)
    pieces = sum(len(one.target.log_probs) for one in scores)
    assert part["perplexity"]["pieces"] == pieces


def test_the_mean_similarity_is_that_of_the_cosines(report: dict[str, Any]):
    for layer in report["layers"]:
        similarity = layer["similarity"]
        cosines = torch.tensor(similarity["cosines"])
        size = len(similarity["experts"])
        assert cosines.shape == (size, size)
        assert cosines.diagonal().allclose(torch.ones(size), atol=2e-3)
        mean = (cosines.sum() - cosines.trace()) / (size * (size - 1))
        assert similarity["mean"] == pytest.approx(float(mean), abs=2e-3)


def test_sentences_are_those_of_the_translator(bundle: Path, report: dict[str, Any]):
    first = report["sentences"][0]
    [result] = Translator.load(bundle).translate(TEXT[0], num_hypotheses=3, with_experts=True)
    [sentence] = result.sentences
    assert first["line"] == 1
    assert first["source_pieces"] == sentence.pieces
    assert first["pieces"] == sentence.hypotheses[0].pieces
    assert [one["text"] for one in first["hypotheses"]] == [o.text for o in sentence.hypotheses]
    assert [[e for e, _ in row] for row in first["experts"]] == [
        [e for e, _ in row] for row in sentence.hypotheses[0].experts or []
    ]
    assert len(first["attention"]) == len(first["pieces"])
    assert first["reference"] == REFERENCES[0]
    assert [one["line"] for one in report["sentences"]] == [1, 3, 5, 6, 7, 8, 9]


def test_quality_is_that_of_sacrebleu(bundle: Path, report: dict[str, Any]):
    from sacrebleu.metrics import BLEU, CHRF

    kept = [0, 2, 4, 5, 6, 7, 8]
    results = [one.text for one in Translator.load(bundle).translate([TEXT[n] for n in kept])]
    references = [REFERENCES[n] for n in kept]
    quality = report["parts"][0]["quality"]
    for row, metric in zip(quality["scores"], (BLEU(), CHRF()), strict=True):
        assert row["score"] == pytest.approx(metric.corpus_score(results, [references]).score)
        assert row["signature"] == str(metric.get_signature())
    lines = [row["line"] for row in (*quality["best"], *quality["worst"])]
    assert len(set(lines)) == len(lines)
    assert set(lines) <= {n + 1 for n in kept}
    assert quality["best"][0]["chrf"] >= quality["worst"][0]["chrf"]


def test_the_page_of_hostile_text_is_harmless(report: dict[str, Any]):
    # The page shows references as complete lines instead of pieces.
    page = render_page(report)
    reader = check_page(page)
    text = " ".join(reader.text)
    for line in HOSTILE:
        assert line in text
    assert ("div", "dir", "rtl") in reader.attributes
    assert "49" not in re.findall(r"\{\{.*?\}\}", text)
    for name in ("load", "experts", "sentences", "quality", "learning", "method"):
        assert name in reader.ids


def test_every_section_has_its_own_title(report: dict[str, Any]):
    titles = re.findall(r"<h[123]>(.*?)</h[123]>", render_page(report))
    assert {"Encoder: expert by expert", "Decoder: expert by expert"} <= set(titles)
    assert len(titles) == len(set(titles))


def test_every_string_in_a_report_is_escaped(report: dict[str, Any]):
    evil = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&"

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value]
        kept = ("format", "layer", "kind", "nmt_moe")
        return evil if isinstance(value, str) and key not in kept else value

    reader = check_page(render_page(poison(report)))
    assert any(evil in part for part in reader.text)


def test_a_second_bundle_is_compared(bundle: Path, tmp_path: Path):
    small = make_bundle(tmp_path, dtype="int8", description=SHORT)[0]
    report = make_report(bundle, [Part("text", TEXT, REFERENCES)], against=small)
    assert report["against"]["dtype"] == "int8"
    [part] = report["parts"]
    assert part["other_perplexity"]["pieces"] == part["perplexity"]["pieces"]
    assert part["other_perplexity"]["per_piece"] != part["perplexity"]["per_piece"]
    rows = part["quality"]["bootstrap"]
    assert [row["name"] for row in rows] == ["BLEU", "chrF"]
    assert all(0 <= row["p"] <= 1 for row in rows)
    for layer in report["layers"]:
        saturation = layer["saturation"]
        assert 0.5 < saturation["kept"] <= 1
        assert saturation["chance"] == pytest.approx(2 / 6)
        assert saturation["tokens"] == layer["usage"]["num_tokens"]
    text = " ".join(check_page(render_page(report)).text)
    assert "Paired bootstrap" in text
    assert "of the experts for" in text
    # A bundle does not differ from itself.
    same = make_report(bundle, [Part("text", TEXT, REFERENCES)], against=bundle)
    assert {layer["saturation"]["kept"] for layer in same["layers"]} == {1.0}
    assert {layer["saturation"]["changed_tokens"] for layer in same["layers"]} == {0.0}
    assert [row["p"] for row in same["parts"][0]["quality"]["bootstrap"]] == [1.0, 1.0]
    assert same["parts"][0]["quality"]["better"] == []


def test_each_language_is_a_part(tmp_path: Path):
    folder = make_bundle(tmp_path, languages="aa bb", description=SHORT)[0]
    parts = [Part(name, TEXT, None, name) for name in ("aa", "bb")]
    report = make_report(folder, parts)
    for layer in report["layers"]:
        assert [part["part"] for part in layer["parts"]] == ["aa", "bb"]
        summed = [sum(loads) for loads in zip(*(p["load"] for p in layer["parts"]), strict=True)]
        assert layer["usage"]["load"] == summed
        [overlap] = layer["overlap"]
        assert 0 <= overlap["overlap"] <= 1
    assert {row["part"] for row in report["sentences"]} == {"aa", "bb"}
    text = " ".join(check_page(render_page(report)).text)
    assert "Overlap of the texts" in text
    with pytest.raises(ValueError, match="`target_lang` must be one of aa, bb, but is 'cc'"):
        make_report(folder, [Part("text", TEXT, None, "cc")])


def test_a_language_model_has_a_report(tmp_path: Path):
    folder = make_bundle(tmp_path, LM)[0]
    report = make_report(folder, [Part("text", TEXT)])
    assert [layer["layer"] for layer in report["layers"]] == ["decoder"]
    assert report["model"]["kind"] == "language_model"
    reader = check_page(render_page(report))
    assert "quality" in reader.ids
    with pytest.raises(ValueError, match="a language model has neither references nor"):
        make_report(folder, [Part("text", TEXT, REFERENCES)])
    same = make_report(folder, [Part("text", TEXT)], against=folder)
    assert same["layers"][0]["saturation"]["kept"] == 1.0
    check_page(render_page(same))
    assert isinstance(load_model(folder), LanguageModel)


def test_a_report_says_that_a_model_is_dense_and_shows_everything_else(
    bundle: Path, tmp_path: Path
):
    folder = make_bundle(tmp_path, replace(GNMT, moe=None), description=SHORT)[0]
    report = make_report(folder, [Part("text", TEXT, REFERENCES)])
    assert report["layers"] == []
    reader = check_page(render_page(report))
    text = " ".join(reader.text)
    assert "This model is dense" in text
    assert "BLEU" in text
    assert "attention" in text.lower()
    both = make_report(bundle, [Part("text", TEXT, REFERENCES)], against=folder)
    assert all("saturation" not in layer for layer in both["layers"])
    assert "is not compared" in " ".join(check_page(render_page(both)).text)


@pytest.mark.parametrize("num_experts", [1, 2100])
def test_reports_on_one_expert_and_on_thousands_fit_on_a_page(num_experts: int, tmp_path: Path):
    moe = MoEConfig(model_dim=16, hidden_dim=4, num_experts=num_experts, top_k=min(4, num_experts))
    folder = make_bundle(tmp_path, replace(LM, moe=moe))[0]
    lines = [f"{one} {other} {one}" for one in WORDS for other in WORDS]
    report = make_report(folder, [Part("text", lines)])
    [layer] = report["layers"]
    assert len(layer["usage"]["load"]) == num_experts
    assert (layer["pairs"] is None) == (num_experts == 1 or num_experts > 2048)
    assert (layer["similarity"] is None) == (num_experts == 1)
    check_page(render_page(report))


def test_a_page_is_made_smaller_until_it_fits(report: dict[str, Any]):
    layer = report["layers"][0]
    expert = layer["experts"][0]
    contexts = [{"context": ["x " * 700] * 5, "gate": 0.5, "line": 1}] * 10
    experts = [{**expert, "contexts": contexts}] * 2000
    sentence = {**report["sentences"][0], "pieces": ["𝕏" * 40] * 300}
    sentence["experts"] = [[[1, 0.5]]] * 300
    sentence["log_probs"] = [-1.0] * 301
    huge = {
        **report,
        "layers": [{**layer, "experts": experts, "num_experts": 6}] * 2,
        "sentences": [sentence] * 24,
    }
    reader = check_page(render_page(huge))
    text = " ".join(reader.text)
    assert re.search(r"shows at most \d+ experts", text)
    assert reader.tags["details"] < 100


def test_values_that_are_not_a_report_are_refused(
    bundle: Path, report: dict[str, Any], tmp_path: Path
):
    for values in ({}, [], {"format": "another"}):
        with pytest.raises(ValueError, match="the values are not a report"):
            render_page(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has the format version 2, but .* shows 1"):
        render_page({**report, "format_version": 2})
    with pytest.raises(ValueError, match="there is nothing to read"):
        make_report(bundle, [Part("text", ["", " "])])
    with pytest.raises(ValueError, match="must have at least one text"):
        make_report(bundle, [])
    other = make_bundle(tmp_path, LM)[0]
    with pytest.raises(ValueError, match="must be of the same kind"):
        make_report(bundle, [Part("text", TEXT)], against=other)


def test_long_sentences_are_cut_and_marked(bundle: Path, tmp_path: Path):
    line = " ".join(WORDS * 20)
    report = make_report(bundle, [Part("text", ["cat", line], ["dog", line])])
    short, *long = report["sentences"]
    assert not short["is_cut"]
    assert len(long) >= 2  # the translator splits the line
    model = make_report(make_bundle(tmp_path, LM)[0], [Part("text", [line])])
    [sentence] = model["sentences"]
    assert sentence["is_cut"]
    assert len(sentence["pieces"]) == len(sentence["experts"]) == len(sentence["log_probs"]) == 128
    assert "pieces of this sentence are shown" in " ".join(check_page(render_page(model)).text)


def test_the_text_direction_follows_the_first_letter():
    assert direction("(1) שלום") == "rtl"
    assert direction(["", "1.", "مرحبا", "a"]) == "rtl"
    assert direction("a שלום") == "ltr"
    assert direction(["<2de>", "", "▁שלום", "", "</s>"]) == "rtl"
    assert direction("12 😀") == direction("") == "ltr"
