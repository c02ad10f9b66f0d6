"""The probabilities of references equal those from the training networks and the search."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nmt_moe import LanguageModel, Translator
from nmt_moe.inference import Description, Pieces, SearchDefaults, TextPipeline, export
from tests.support.bundles import GNMT, LM, make_bundle, make_checkpoint

TEXTS = ["the big dog sees a red tree", "", "cat", "under ☃ the house runs the cat", "a dog"]
REFERENCES = ["dog tree", "cat", "", "a ☃ the house under the tree sees a cat", "a cat"]
SHORT = SearchDefaults(max_len_b=6, beam_size=3)


@pytest.fixture(scope="module", params=["recurrent", "parallel"])
def opened(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Translator, dict[str, nn.Module]]:
    config = replace(GNMT, attention_wiring=request.param)
    folder = tmp_path_factory.mktemp(request.param)
    path, networks = make_bundle(folder, config, description=Description(search=SHORT))
    return Translator.load(path), networks


def numbers(translator: Translator, pieces: list[str]) -> list[int]:
    return translator.vocabularies["target"].numbers(pieces)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10**6])
def test_references_get_the_same_probability_as_in_training(
    opened: tuple[Translator, dict[str, Any]], batch_tokens: int
):
    translator, networks = opened
    scores = translator.score(
        TEXTS, REFERENCES, batch_tokens=batch_tokens, with_experts=True, with_inputs=True
    )
    assert len(scores) == len(TEXTS)
    for text, reference, score in zip(TEXTS, REFERENCES, scores, strict=True):
        assert score.source_tokens[-1] == "</s>"
        assert "".join(score.source_tokens[:-1]).replace("▁", " ").split() == text.split()
        assert "".join(score.target.pieces).replace("▁", " ").split() == reference.split()
        source = torch.tensor([[*numbers(translator, score.source_tokens[:-1]), 2]])
        target = numbers(translator, score.target.pieces)
        with torch.no_grad():
            encoded = networks["encoder"](source, source.eq(1))
            out = networks["decoder"](torch.tensor([[2, *target]]), encoded)
            log_probs = networks["output"](out.features).log_softmax(dim=2)[0]
        wanted = log_probs.gather(1, torch.tensor([*target, 2]).unsqueeze(1)).squeeze(1)
        assert score.target.log_probs == pytest.approx(wanted.tolist(), abs=5e-5)
        assert score.target.log_prob == pytest.approx(float(wanted.sum()), abs=2e-4)
        assert_close(score.attention, out.attention[0], atol=2e-5, rtol=1e-4)
        assert score.target.num_unknown == target.count(3)
        assert score.target.num_words == len(reference.split())
        for routing, stats in (
            (score.routing, encoded.moe_stats),
            (score.target.routing, out.moe_stats),
        ):
            assert routing is not None
            order = stats.gates.argsort(dim=1, descending=True, stable=True)
            found = routing.gates.argsort(dim=1, descending=True, stable=True)
            assert routing.expert_ids.gather(1, found).equal(stats.expert_ids.gather(1, order))
            wanted_gates = stats.gates.gather(1, order)
            assert_close(routing.gates.gather(1, found), wanted_gates, atol=1e-4, rtol=1e-4)
            assert routing.inputs is not None
            assert routing.inputs.shape == (len(routing.gates), 16)


def test_a_translation_gets_the_same_probability_as_in_its_search(opened: tuple[Translator, Any]):
    translator = opened[0]
    for result in translator.translate(
        ["cat", "the dog runs"], num_hypotheses=3, with_experts=True
    ):
        [sentence] = result.sentences
        own = [one.pieces for one in sentence.hypotheses]
        scores = translator.score_pieces([sentence.pieces] * 3, own, with_experts=True)
        for one, score in zip(sentence.hypotheses, scores, strict=True):
            assert score.target.log_probs == pytest.approx(one.log_probs, abs=2e-5)
            assert_close(score.attention[:-1, :-1], one.attention, atol=1e-5, rtol=1e-4)
            assert score.target.routing is not None
            experts = score.target.routing[: len(one.pieces)].to_experts()
            assert [[e for e, _ in row] for row in experts] == [
                [e for e, _ in row] for row in one.experts or []
            ]


def test_an_ensemble_averages_probabilities(tmp_path: Path):
    folders = [make_bundle(tmp_path / str(seed), seed=seed)[0] for seed in (1, 2)]
    each = [Translator.load(one).score("cat", "a dog")[0] for one in folders]
    [both] = Translator.load(folders).score("cat", "a dog", with_experts=True)
    first, second = (one.target.log_probs[0] for one in each)
    mean = math.log((math.exp(first) + math.exp(second)) / 2)
    assert both.target.log_probs[0] == pytest.approx(mean, abs=1e-5)
    [alone] = Translator.load(folders[0]).score("cat", "a dog", with_experts=True)
    assert both.routing is not None
    assert alone.routing is not None
    assert both.routing.expert_ids.equal(alone.routing.expert_ids)


def test_only_the_source_is_lower_cased(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    export(
        path, data, Pieces(pieces), tmp_path / "b", "float32", Description(text=TextPipeline(True))
    )
    [score] = Translator.load(tmp_path / "b").score("The Cat", "The Cat")
    assert "".join(score.source_tokens) == "▁the▁cat</s>"
    assert "".join(score.target.pieces) == "▁The▁Cat"


def test_the_language_token_is_read(tmp_path: Path):
    translator = Translator.load(make_bundle(tmp_path, languages="aa bb")[0])
    scores = [translator.score("cat", "dog", lang, with_experts=True)[0] for lang in ("aa", "bb")]
    assert [one.source_tokens[0] for one in scores] == ["<2aa>", "<2bb>"]
    assert scores[0].target.log_prob != scores[1].target.log_prob
    assert scores[0].routing is not None
    assert len(scores[0].routing.gates) == len(scores[0].source_tokens)


def test_pairs_that_cannot_be_scored_are_refused(opened: tuple[Translator, Any]):
    translator = opened[0]
    with pytest.raises(ValueError, match="texts is 2, and the number of references is 1"):
        translator.score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="reference 2 contains the control character"):
        translator.score(["a", "b"], ["a", "b\0"])
    with pytest.raises(ValueError, match="`references` must be a list of strings, but is NoneType"):
        translator.score(["a"], None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`batch_tokens` must be"):
        translator.score(["a"], ["a"], batch_tokens=0)
    assert translator.score([], []) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_layer_adds_the_experts_outputs_weighted_by_gates(dtype: str, tmp_path: Path):
    translator = Translator.load(make_bundle(tmp_path, dtype=dtype)[0])
    [score] = translator.score("the cat runs", "a dog", with_experts=True, with_inputs=True)
    routings = {"encoder": score.routing, "decoder": score.target.routing}
    assert list(translator.moe_layers) == ["encoder", "decoder"]
    for side, layer in translator.moe_layers.items():
        routing: Any = routings[side]
        outputs = layer.expert_outputs(routing.inputs, range(6))
        assert outputs.shape == (6, len(routing.gates), 16)
        chosen = outputs[routing.expert_ids, torch.arange(len(routing.gates)).unsqueeze(1)]
        mixed = (routing.gates.unsqueeze(2) * chosen).sum(dim=1)
        assert_close(layer(routing.inputs), routing.inputs + mixed.sigmoid(), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("batch_tokens", [1, 25, 10**6])
def test_experts_of_a_language_model_are_those_of_its_steps(batch_tokens: int, tmp_path: Path):
    from nmt_moe.inference.layers import Trace

    model: Any = LanguageModel.load(make_bundle(tmp_path, LM)[0])
    lines = ["the big dog", "", "a cat sees a tree under the house", "cat"]
    scores = model.score(lines, batch_tokens=batch_tokens, with_experts=True, with_inputs=True)
    for one, plain in zip(scores, model.score(lines), strict=True):
        assert one.log_probs == pytest.approx(plain.log_probs, abs=1e-5)
    for score in scores:
        states, trace = model._network.start(1), Trace([], [], [])
        for token in [2, *model._vocabulary.numbers(score.pieces)]:
            _, states = model._network.step(torch.tensor([token]), states, trace)
        assert score.routing.expert_ids.equal(torch.cat(trace.expert_ids))
        assert_close(score.routing.gates, torch.cat(trace.gates), atol=1e-5, rtol=1e-4)
        assert trace.inputs
        assert_close(score.routing.inputs, torch.cat(trace.inputs), atol=1e-5, rtol=1e-4)
    assert model.score("cat")[0].routing is None
