"""Translation of raw text: order, lines, batches, searches, ensembles, experts and marks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import nn

from nmt_moe import Translator
from nmt_moe.inference import Description, Pieces, SearchDefaults, TextPipeline, Translation, export
from nmt_moe.kernels import has_compiled_loops
from nmt_moe.search import BeamConfig, SearchConfig
from nmt_moe.text.lines import BadLine
from tests.support import reference_search
from tests.support.bundles import GNMT, MOE, make_bundle, make_checkpoint, write_text

MAX_LENGTH = 8
DESCRIPTION = Description(
    search=SearchDefaults(max_len_b=MAX_LENGTH), text=TextPipeline(max_source_pieces=24)
)
TEXTS = [
    "the big dog sees a red tree",
    "cat",
    "under the house runs the cat with a dog",
    "a tree",
    "the cat sees the dog under the big red house with the tree",
]


@dataclass(frozen=True)
class Model:
    """An open bundle and the training networks from which it was made."""

    folder: Path
    translator: Translator
    networks: dict[str, nn.Module]

    def numbers(self, pieces: list[str], mark: str = "") -> list[int]:
        """Return the numbers that the network receives for the pieces of a source sentence."""
        symbols = self.translator.vocabularies["source"].symbols
        known = {s: n for n, s in enumerate(symbols) if n > 3 and not s.startswith("<2")}
        marks = [symbols.index(mark)] if mark else []
        return [*marks, *(known.get(piece, 3) for piece in pieces), 2]

    def written(self, pieces: list[str]) -> list[int]:
        """Return the numbers of the pieces in a hypothesis."""
        symbols = self.translator.vocabularies["target"].symbols
        return [symbols.index(piece) for piece in pieces]


def make_model(folder: Path, seed: int = 1, languages: str = "") -> Model:
    config = replace(GNMT, moe=replace(MOE, num_experts=8, num_groups=4))
    bundle, networks = make_bundle(
        folder, config, seed=seed, languages=languages, description=DESCRIPTION
    )
    return Model(bundle, Translator.load(bundle), networks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("other"), seed=2)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("many"), languages="aa bb cc")


def texts_of(results: list[Translation]) -> list[str]:
    return [one.text for one in results]


def test_each_text_gets_its_own_translation_in_the_order_given(model: Model):
    together = texts_of(model.translator.translate(TEXTS))
    assert together == [model.translator.translate(text)[0].text for text in TEXTS]
    assert texts_of(model.translator.translate(TEXTS[::-1])) == together[::-1]
    assert len(set(together)) > 2


def test_a_line_without_words_gives_a_blank_line(model: Model):
    blanks = ["", " ", "\t", "\u3000", "\u2028", "\u00a0 "]
    for result in model.translator.translate(blanks, num_hypotheses=2):
        assert (result.text, result.score, result.hypotheses) == ("", 0, [""])
        assert result.sentences == []
    assert texts_of(model.translator.translate(["\n\n", " \n", "\r\n"])) == ["\n\n", "\n", "\n"]
    assert model.translator.translate([]) == []


def test_lines_of_a_text_stay_lines(model: Model):
    one, two = texts_of(model.translator.translate(TEXTS[:2]))
    text = f"{TEXTS[0]}\n\n{TEXTS[1]}\n"
    [plain] = model.translator.translate(text)
    [windows] = model.translator.translate([text.replace("\n", "\r\n")])
    assert plain.text == windows.text == f"{one}\n\n{two}\n"
    assert len(plain.sentences) == 2
    assert plain.score == pytest.approx(sum(s.hypotheses[0].score for s in plain.sentences))


@pytest.mark.parametrize(("batch_tokens", "threads"), [(1, 1), (30, 1), (10**9, 1), (30, 2)])
def test_batches_and_threads_change_only_the_last_bits(
    model: Model, batch_tokens: int, threads: int
):
    wanted = model.translator.translate(TEXTS, num_hypotheses=3)
    try:
        torch.set_num_threads(threads)
        found = model.translator.translate(TEXTS, num_hypotheses=3, batch_tokens=batch_tokens)
    finally:
        torch.set_num_threads(1)
    for one, same in zip(wanted, found, strict=True):
        assert one.hypotheses == same.hypotheses
        assert one.score == pytest.approx(same.score, abs=1e-5)


def test_nbest_lists_have_the_requested_length_and_descending_scores(model: Model):
    for result in model.translator.translate(TEXTS, beam_size=6, num_hypotheses=4):
        [sentence] = result.sentences
        scores = [one.score for one in sentence.hypotheses]
        assert result.score == scores[0]
        assert result.hypotheses == [one.text for one in sentence.hypotheses]
        assert len(scores) == 4
        assert all(one >= two for one, two in pairwise(scores))
        assert len({tuple(one.pieces) for one in sentence.hypotheses}) == 4


SEARCHES: dict[str, Any] = {
    "plain": {},
    "greedy": {"beam_size": 1},
    "wide": {"beam_size": 12},
    "penalties": {"length_penalty_alpha": 0.4, "coverage_penalty_beta": 0.3},
    "pruned": {"beam_prune": 1.5},
    "pruned penalties": {
        "length_penalty_alpha": 0.2,
        "coverage_penalty_beta": 0.2,
        "beam_prune": 2.0,
    },
}


def search_config(options: dict[str, float]) -> BeamConfig:
    penalties = {name: value for name, value in options.items() if name != "beam_size"}
    return BeamConfig(int(options.get("beam_size", 5)), search=SearchConfig(**penalties))


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("mark", ["", "<2cc>"])
def test_hypotheses_are_those_of_the_training_networks(
    model: Model, many: Model, mark: str, options: dict[str, Any]
):
    one = many if mark else model
    number = min(5, options.get("beam_size", 5))
    target = "cc" if mark else None
    results = one.translator.translate(TEXTS, target, num_hypotheses=number, **options)
    for result in results[:: 2 if mark else 1]:
        [sentence] = result.sentences
        source = one.numbers(sentence.pieces, mark)
        wanted = reference_search.translate(
            [one.networks], source, search_config(options), MAX_LENGTH
        )
        assert len(sentence.hypotheses) == min(number, len(wanted))
        for found, expected in zip(sentence.hypotheses, wanted, strict=False):
            assert [*one.written(found.pieces), 2] == expected.tokens.tolist()
            assert found.score == pytest.approx(float(expected.score), abs=1e-5)


def test_log_probs_are_given_for_each_piece_and_the_end(model: Model):
    for result in model.translator.translate(TEXTS):
        for sentence in result.sentences:
            [best] = sentence.hypotheses
            tokens = model.written(best.pieces)
            read = torch.tensor([[2, *tokens]])
            source = model.numbers(sentence.pieces)
            log_probs, _ = reference_search.mean_prediction([model.networks], source, read)
            wanted = log_probs[0].gather(1, torch.tensor([*tokens, 2]).unsqueeze(1)).squeeze(1)
            assert best.log_probs == pytest.approx(wanted.tolist(), abs=2e-5)
            assert best.score == pytest.approx(sum(best.log_probs) / len(best.log_probs), abs=1e-5)


def test_an_ensemble_of_the_same_bundle_twice_equals_the_bundle(model: Model):
    twice = Translator.load([model.folder, model.folder])
    for one, same in zip(
        model.translator.translate(TEXTS, num_hypotheses=3),
        twice.translate(TEXTS, num_hypotheses=3),
        strict=True,
    ):
        assert one.hypotheses == same.hypotheses
        assert one.score == pytest.approx(same.score, abs=1e-5)


def test_an_ensemble_averages_probabilities(model: Model, other: Model):
    both = Translator.load([str(model.folder), other.folder])
    alone = texts_of(model.translator.translate(TEXTS))
    results = both.translate(TEXTS, num_hypotheses=2)
    assert texts_of(results) != alone
    models = [model.networks, other.networks]
    for result in results:
        [sentence] = result.sentences
        source = model.numbers(sentence.pieces)
        wanted = reference_search.translate(models, source, BeamConfig(), MAX_LENGTH)
        for found, expected in zip(sentence.hypotheses, wanted, strict=False):
            assert [*model.written(found.pieces), 2] == expected.tokens.tolist()
            assert found.score == pytest.approx(float(expected.score), abs=1e-5)
            attention = expected.attention
            assert attention is not None
            torch.testing.assert_close(found.attention, attention.t()[:-1, :-1], atol=1e-5, rtol=0)


def test_an_ensemble_of_bundles_that_read_different_text_is_refused(
    model: Model, many: Model, tmp_path: Path
):
    with pytest.raises(ValueError, match="cannot form an ensemble: .* in their vocabulary"):
        Translator.load([model.folder, many.folder])
    lower = replace(DESCRIPTION, text=replace(DESCRIPTION.text, lowercase=True))
    folder, _ = make_bundle(tmp_path, model.translator.config.network, description=lower)
    with pytest.raises(ValueError, match="differ in their text pipeline"):
        Translator.load([model.folder, folder])
    with pytest.raises(ValueError, match="`folder` must name at least one bundle"):
        Translator.load([])


@pytest.mark.parametrize("mark", ["", "<2bb>"])
def test_attention_counts_the_pieces_of_the_text_and_no_marks(model: Model, many: Model, mark: str):
    one = many if mark else model
    results = one.translator.translate(TEXTS, "bb" if mark else None, num_hypotheses=2)
    for result in results:
        [sentence] = result.sentences
        first = 1 if mark else 0
        for found in sentence.hypotheses:
            assert found.attention.shape == (len(found.pieces), len(sentence.pieces))
            read = torch.tensor([[2, *one.written(found.pieces)]])
            source = one.numbers(sentence.pieces, mark)
            _, attention = reference_search.mean_prediction([one.networks], source, read)
            torch.testing.assert_close(attention.sum(dim=2), torch.ones(1, read.shape[1]))
            wanted = attention[0, :-1, first:-1]
            torch.testing.assert_close(found.attention, wanted, atol=1e-5, rtol=0)
            assert found.alignment == wanted.argmax(dim=1).tolist()


def by_token(stats: Any, count: int) -> list[dict[int, float]]:
    """Return each token's experts with their gates."""
    return [
        {expert: gate for expert, gate in zip(ids, gates, strict=True) if gate > 0}
        for ids, gates in zip(
            stats.expert_ids.view(count, -1).tolist(),
            stats.gates.view(count, -1).tolist(),
            strict=True,
        )
    ]


@pytest.mark.parametrize("mark", ["", "<2bb>"])
def test_experts_are_those_of_the_training_networks(model: Model, many: Model, mark: str):
    one = many if mark else model
    results = one.translator.translate(
        TEXTS, "bb" if mark else None, num_hypotheses=2, with_experts=True
    )
    first = 1 if mark else 0
    for result in results:
        [sentence] = result.sentences
        source = torch.tensor([one.numbers(sentence.pieces, mark)])
        for found in sentence.hypotheses:
            read = torch.tensor([[2, *one.written(found.pieces)]])
            with torch.no_grad():
                encoded = one.networks["encoder"](source, torch.zeros_like(source, dtype=bool))
                decoded = one.networks["decoder"](read, encoded)
            of_source = by_token(encoded.moe_stats, source.shape[1])[first:-1]
            of_target = by_token(decoded.moe_stats, read.shape[1])[:-1]
            assert found.experts is not None
            assert sentence.experts is not None
            for have, want in ((sentence.experts, of_source), (found.experts, of_target)):
                assert [dict(row) for row in have] == [pytest.approx(row, abs=1e-5) for row in want]
                assert all(row == sorted(row, key=lambda pair: -pair[1]) for row in have)
    plain = one.translator.translate(TEXTS, "bb" if mark else None)
    assert all(s.experts is None for result in plain for s in result.sentences)


MARKS = ["</s>", "<unk>", "<pad>", "<s>", "<2bb>", "<2aa>"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_typed_mark_is_text(many: Model, mark: str):
    vocabulary = many.translator.vocabularies["source"]
    for text in (mark, f"the cat {mark} dog", f"{mark} the cat", f"{mark}{mark}"):
        [result] = many.translator.translate(text, "bb")
        [sentence] = result.sentences
        assert "".join(sentence.pieces).replace("▁", " ").strip() == text
        numbers = vocabulary.numbers(sentence.pieces)
        assert all(number == 3 or vocabulary.symbols[number] not in MARKS for number in numbers)
    assert many.translator.translate(f"cat {mark} dog", "bb") != []


def test_a_piece_that_is_spelled_as_a_mark_is_an_unknown_word(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path, languages="aa bb")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "marked"),
        vocab_size=36,
        hard_vocab_limit=False,
        user_defined_symbols=["<2bb>", "<pad>", "<2aa>"],
        minloglevel=2,
    )
    folder = tmp_path / "marked-bundle"
    export(path, data, Pieces(tmp_path / "marked.model"), folder, description=DESCRIPTION)
    translator = Translator.load(folder)
    [result] = translator.translate("the cat <2bb> dog<pad>", "aa")
    pieces = result.sentences[0].pieces
    assert "<2bb>" in pieces
    assert "<pad>" in pieces
    numbers = translator.vocabularies["source"].numbers(pieces)
    assert [n for piece, n in zip(pieces, numbers, strict=True) if piece in MARKS] == [3, 3]


def test_a_target_language_must_be_one_of_the_model(model: Model, many: Model):
    with pytest.raises(ValueError, match="`target_lang` must be one of aa, bb, cc, but is missing"):
        many.translator.translate("cat")
    for name in ("dd", "<2bb>", "", 5, "aa bb"):
        with pytest.raises(ValueError, match="`target_lang` must be one of aa, bb, cc, but is '"):
            many.translator.translate("cat", name)
    with pytest.raises(ValueError, match="`target_lang` must be one of bb, but is 'aa'"):
        model.translator.translate("cat", "aa")
    results = {name: many.translator.translate(TEXTS, name) for name in many.translator.languages}
    assert len({tuple(texts_of(found)) for found in results.values()}) == 3
    assert texts_of(model.translator.translate(TEXTS, "bb")) == texts_of(
        model.translator.translate(TEXTS)
    )


OPTIONS: dict[str, tuple[Any, ...]] = {
    "beam_size": (0, -1, 1.5, float("nan"), True, "5", 10**9, [5]),
    "num_hypotheses": (0, -1, 1.0, float("nan"), True, "5", 6, 10**9, None),
    "length_penalty_alpha": (-1, float("nan"), float("inf"), True, "5", [1]),
    "coverage_penalty_beta": (-0.1, float("nan"), float("inf"), True, "5"),
    "beam_prune": (-1, float("nan"), float("inf"), True, "5"),
    "batch_tokens": (0, -1, 1.5, float("nan"), True, "5", None),
}


@pytest.mark.parametrize(("name", "values"), OPTIONS.items(), ids=OPTIONS)
def test_options_out_of_range_are_named(model: Model, name: str, values: tuple[Any, ...]):
    for value in values:
        given: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"`{name}` must be .* but is ") as caught:
            model.translator.translate(["cat"], **given)
        assert str(value) in str(caught.value)
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            next(model.translator.translate_lines(["cat"], **given))


def test_invalid_text_is_named(model: Model):
    faults = {
        "a \ud800 b": r"half of a surrogate pair, U\+D800, at character 3",
        "cat\0": r"the control character U\+0000",
        "\x1b[31mcat": r"the control character U\+001B",
        "a\rb": r"the control character U\+000D",
        "\x7f": r"the control character U\+007F",
    }
    for text, fault in faults.items():
        with pytest.raises(ValueError, match=f"^text 2 contains {fault}. Remove it"):
            model.translator.translate(["cat", text])
    for value in (5, None, b"cat", ["cat"]):
        with pytest.raises(ValueError, match="text 2 must be a string, but is "):
            model.translator.translate(["cat", value])  # type: ignore[list-item]
    for value in (b"cat", None, 5):
        with pytest.raises(ValueError, match="`texts` must be a list of strings, but is "):
            model.translator.translate(value)  # type: ignore[arg-type]
    assert texts_of(model.translator.translate("cat")) == texts_of(
        model.translator.translate(["cat"])
    )


def test_a_bad_line_is_handed_on_and_the_others_are_translated(model: Model):
    wanted = texts_of(model.translator.translate(["cat", "a dog", "tree"]))
    bad = BadLine(2, "is bad", "Correct it.")
    for read_ahead in (1, 2, 100):
        lines = ["cat", bad, "a dog", "a\0b", "tree", "\udfff"]
        found = list(model.translator.translate_lines(lines, read_ahead=read_ahead))
        assert [one.text for one in found if isinstance(one, Translation)] == wanted
        assert found[1] is bad
        for number in (4, 6):
            one = found[number - 1]
            assert isinstance(one, BadLine)
            assert one.number == number
    with pytest.raises(ValueError, match="`lines` must be a series of lines, but is one string"):
        next(model.translator.translate_lines("cat"))
    with pytest.raises(ValueError, match="`read_ahead` must be"):
        next(model.translator.translate_lines(["cat"], read_ahead=0))


def test_lines_are_translated_as_they_come(model: Model):
    given: list[int] = []

    def lines():
        for number in range(6):
            given.append(number)
            yield "cat"

    results = model.translator.translate_lines(lines(), read_ahead=2)
    next(results)
    assert given == [0, 1]
    next(results), next(results)
    assert given == [0, 1, 2, 3]


def spy_on_pieces(translator: Translator, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the sentences to translate, instead of translating them."""
    seen: list[list[str]] = []

    def record(cut: list[list[str]], options: Any) -> list[Any]:
        seen.extend(cut)
        return []

    monkeypatch.setattr(translator, "_translate_pieces", record)
    return seen


LONG: dict[str, Callable[[], str]] = {
    "words": lambda: "the big red dog sees a cat. " * 3600,
    "no spaces": lambda: "dog" * 33_334,
    "one word": lambda: "a" * 100_000,
    "no sentences": lambda: "the cat with a dog " * 5300,
    "unknown": lambda: "猫" * 100_000,
    "spaces": lambda: "cat" + " " * 100_000 + "dog",
    "full stops": lambda: "." * 100_000,
    "lines": lambda: "the cat.\n" * 12_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_is_cut_into_parts_without_loss(
    model: Model, name: str, monkeypatch: pytest.MonkeyPatch
):
    text = LONG[name]()
    cut = [model.translator._source_text.split(line) for line in text.split("\n")]
    parts = [pieces for of_line in cut for pieces in of_line]
    assert max(map(len, parts)) <= 24
    assert min(map(len, parts)) > 0
    joined = " ".join("".join(pieces).replace("▁", " ").strip() for pieces in parts)
    assert joined.replace(" ", "") == "".join(text.split())


def test_a_long_line_is_split_between_sentences(model: Model):
    sentences = ["The big dog sees a red cat.", "A tree runs under the house!", "Cat?"] * 3
    parts = model.translator._source_text.split(" ".join(sentences))
    assert len(parts) >= 3
    starts = ["".join(pieces).replace("▁", " ").split()[0] for pieces in parts]
    assert starts[:3] == ["The", "A", "Cat?"]


def test_a_long_text_comes_back_as_one_line(model: Model):
    text = "The cat sees a dog. A tree runs. " * 8
    [result] = model.translator.translate(text)
    assert len(result.sentences) > 1
    assert result.text == " ".join(s.hypotheses[0].text for s in result.sentences)
    assert "\n" not in result.text
    assert result.score == pytest.approx(sum(s.hypotheses[0].score for s in result.sentences))


@pytest.mark.parametrize(("language", "separator"), [("ja", ""), ("zh_CN", ""), ("bb", " ")])
def test_sentences_are_joined_as_the_target_language_is_written(
    language: str, separator: str, tmp_path: Path
):
    folder, _ = make_bundle(tmp_path, languages=f"aa {language}", description=DESCRIPTION)
    [result] = Translator.load(folder).translate("the cat sees a dog. " * 6, language)
    texts = [s.hypotheses[0].text for s in result.sentences]
    assert len(texts) > 1
    assert result.text == separator.join(texts)


def test_text_is_prepared_as_in_training(tmp_path: Path):
    text = TextPipeline(lowercase=True, normalize_punctuation=True)
    folder, _ = make_bundle(
        tmp_path, description=Description(text=text, search=SearchDefaults(max_len_b=MAX_LENGTH))
    )
    translator = Translator.load(folder)
    [shouted, quiet] = translator.translate(["The CAT „sees“ a dog …", 'the cat "sees" a dog ...'])
    assert shouted.sentences[0].pieces == quiet.sentences[0].pieces
    assert shouted.text == quiet.text


def test_without_pieces_a_text_consists_of_words(tmp_path: Path):
    path, data, _, _ = make_checkpoint(tmp_path)
    export(path, data, Pieces(), tmp_path / "words", description=DESCRIPTION)
    translator = Translator.load(tmp_path / "words")
    [result] = translator.translate("▁the  ▁cat\u3000</s> <unk>")
    assert result.sentences[0].pieces == ["▁the", "▁cat", "</s>", "<unk>"]
    best = result.sentences[0].hypotheses[0]
    assert result.text == " ".join(best.pieces)


def test_a_text_of_several_sentences_has_the_pieces_and_alignments_of_all(model: Model):
    translator = model.translator
    [whole] = translator.translate(["the cat\na dog sees"], with_experts=True)
    parts = translator.translate(["the cat", "a dog sees"], with_experts=True)
    assert whole.pieces == parts[0].pieces + parts[1].pieces
    assert whole.source_pieces == parts[0].source_pieces + parts[1].source_pieces
    shift = len(parts[0].source_pieces)
    shifted = [index + shift for index in parts[1].alignment]
    assert whole.alignment == parts[0].alignment + shifted
    assert [len(whole.experts or []), len(whole.source_experts or [])] == [
        len(whole.pieces),
        len(whole.source_pieces),
    ]
    [plain] = translator.translate(["the cat"])
    assert plain.experts is None


def test_threads_and_batches_do_not_change_hypotheses(tmp_path: Path):
    folder, _ = make_bundle(tmp_path, GNMT)
    translator = Translator.load(folder)
    texts = write_text(tmp_path / "lines", 60).read_text().splitlines()
    found, before = [], torch.get_num_threads()
    try:
        for threads, batch_tokens in ((1, 1), (1, 400), (3, 40), (3, 400)):
            torch.set_num_threads(threads)
            results = translator.translate(texts, batch_tokens=batch_tokens)
            assert torch.get_num_threads() == threads
            found.append([(one.text, one.score) for one in results])
    finally:
        torch.set_num_threads(before)
    if has_compiled_loops(torch.zeros(1)):  # even the scores are equal to the last bit
        assert found[1:] == found[:1] * 3
    assert [[text for text, _ in one] for one in found[1:]] == [[t for t, _ in found[0]]] * 3


def test_a_failure_in_a_thread_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, _ = make_bundle(tmp_path, GNMT)
    translator, before = Translator.load(folder), torch.get_num_threads()

    def fail(*arguments: Any) -> None:
        raise ValueError("no such step")

    monkeypatch.setattr("nmt_moe.inference.translator.search", fail)
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="no such step"):
            translator.translate(["the cat", "a dog runs"], batch_tokens=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
