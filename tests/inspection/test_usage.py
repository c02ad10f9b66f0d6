"""Sums over tokens, compared with their definitions and with the layer's own statistics."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from nmt_moe import LanguageModel, Translator
from nmt_moe.inference import Description, SearchDefaults
from nmt_moe.inspection import ExpertUsage, collect_usage
from nmt_moe.moe import MoEConfig, MoELayer
from tests.support.bundles import GNMT, LM, make_bundle

SHORT = Description(search=SearchDefaults(max_len_b=6, beam_size=2))
TEXTS = ["the big dog sees a red tree", "", "cat", "under the house runs the cat", "a dog"]
REFERENCES = ["dog tree", "cat", "a red cat", " ", "the house under the tree sees a cat"]


def draw(num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.rand(num_tokens, num_experts, generator=generator)
    values, expert_ids = logits.topk(top_k, dim=1)
    gates = values.softmax(dim=1)
    empty = torch.rand(num_tokens, top_k, generator=generator) < 0.2
    return expert_ids.masked_fill(empty, num_experts), gates.masked_fill(empty, 0)


def test_usage_by_hand():
    usage = ExpertUsage(3)
    usage.add(torch.tensor([[0, 1], [0, 3]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
    usage.add(torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.5]]))
    assert usage.num_tokens == 3
    assert usage.load.tolist() == [3, 2, 0]
    assert usage.importance.tolist() == [2.25, 0.75, 0.0]
    assert usage.squares.tolist() == [0.75**2 + 1 + 0.25, 0.25**2 + 0.25, 0.0]
    assert usage.coactivation is not None
    assert usage.coactivation.tolist() == [[0, 2, 0], [2, 0, 0], [0, 0, 0]]
    assert usage.idle_experts == 1
    assert usage.max_load == pytest.approx(3 / (5 / 3))
    # The load has mean 5/3 and variance (16 + 1 + 25) / 9 / 3. The importance has mean 1.
    assert usage.cv_load == pytest.approx(math.sqrt(42 / 27) / (5 / 3))
    assert usage.cv_importance == pytest.approx(math.sqrt((1.25**2 + 0.25**2 + 1) / 3))
    entropies = [-0.75 * math.log(0.75) - 0.25 * math.log(0.25), 0.0, math.log(2)]
    assert usage.gate_entropy == pytest.approx(sum(entropies) / 3)
    assert usage.gate_margin == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    shares = [0.6, 0.4]
    assert usage.effective_experts == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 1), (7, 3), (40, 4)])
def test_sums_over_batches_match_the_definitions(num_experts: int, top_k: int):
    expert_ids, gates = draw(97, num_experts, top_k)
    whole, parts, joined = (ExpertUsage(num_experts) for _ in range(3))
    whole.add(expert_ids, gates)
    for first in range(0, 97, 10):
        rows = slice(first, first + 10)
        parts.add(expert_ids[rows], gates[rows])
        one = ExpertUsage(num_experts)
        one.add(expert_ids[rows], gates[rows])
        joined += one
    load, pairs = [0] * num_experts, [[0] * num_experts for _ in range(num_experts)]
    for row in expert_ids.tolist():
        present = [expert for expert in row if expert < num_experts]
        for expert in present:
            load[expert] += 1
        for one, other in combinations(present, 2):
            pairs[one][other] += 1
            pairs[other][one] += 1
    for usage in (whole, parts, joined):
        assert usage.load.tolist() == load
        assert usage.coactivation is not None
        assert usage.coactivation.tolist() == pairs
        assert usage.num_tokens == 97
        for name, value in whole.to_dict().items():
            assert getattr(usage, name) == pytest.approx(torch.as_tensor(value)), name


def test_load_and_importance_are_those_of_the_layer():
    layer = MoELayer(MoEConfig(model_dim=8, hidden_dim=8, num_experts=6, top_k=2)).eval()
    torch.nn.init.normal_(layer.gate.gate_weight)
    with torch.no_grad():
        _, stats = layer(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
    usage = ExpertUsage(6)
    usage.add(stats.expert_ids, stats.gates)
    assert usage.load.equal(stats.tokens_per_expert)
    torch.testing.assert_close(usage.importance.float(), stats.importance)


def test_values_that_cannot_be_added_are_refused():
    usage = ExpertUsage(3)
    with pytest.raises(ValueError, match="`expert_ids` must be from 0 to 3, but are from 1 to 4"):
        usage.add(torch.tensor([[1, 4]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="`gates`"):
        usage.add(torch.tensor([[1, 2]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="`other` must have 3 experts, but has 4"):
        usage += ExpertUsage(4)
    usage.add(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert usage.num_tokens == usage.cv_load == usage.gate_entropy == 0


def test_pairs_of_many_experts_are_not_counted():
    usage = ExpertUsage(3000)
    usage.add(torch.tensor([[1, 2999]]), torch.full((1, 2), 0.5))
    assert usage.coactivation is None
    assert usage.load.sum() == 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("usage"), description=SHORT)[0]


def test_given_references_are_read(bundle: Path):
    translator = Translator.load(bundle)
    found = collect_usage(translator, TEXTS, REFERENCES)
    assert (found.num_lines, found.num_blank) == (5, 2)
    kept = [0, 2, 4]
    scores = translator.score([TEXTS[n] for n in kept], [REFERENCES[n] for n in kept])
    assert found.score is not None
    assert found.score.log_prob == pytest.approx(sum(one.target.log_prob for one in scores))
    assert found.layers["encoder"].num_tokens == sum(len(one.source_tokens) for one in scores)
    assert found.layers["decoder"].num_tokens == sum(len(one.target.log_probs) for one in scores)
    assert found.layers["decoder"].importance.sum() == pytest.approx(
        found.layers["decoder"].num_tokens
    )


def test_without_references_the_models_own_translations_are_read(bundle: Path):
    translator = Translator.load(bundle)
    found = collect_usage(translator, TEXTS, beam_size=1)
    results = translator.translate(TEXTS, beam_size=1, with_experts=True)
    load = torch.zeros(6, dtype=torch.int64)
    for result in results:
        for experts in result.source_experts or []:
            for expert, _ in experts:
                load[expert] += 1
    ends = torch.zeros(6, dtype=torch.int64)
    for score in translator.score([text for text in TEXTS if text], ["a"] * 4, with_experts=True):
        assert score.routing is not None
        ends += score.routing.expert_ids[-1].bincount(minlength=6)
    assert found.layers["encoder"].load.equal(load + ends)
    pieces = sum(len(result.pieces) + 1 for result in results if result.sentences)
    assert found.layers["decoder"].num_tokens == pieces
    assert found.num_blank == 1


def test_a_language_model_reads_lines(tmp_path: Path):
    model = LanguageModel.load(make_bundle(tmp_path, LM)[0])
    found = collect_usage(model, TEXTS)
    scores = model.score([text for text in TEXTS if text])
    assert found.score is not None
    assert found.score.log_prob == pytest.approx(sum(one.log_prob for one in scores))
    assert list(found.layers) == ["decoder"]
    assert found.layers["decoder"].num_tokens == sum(len(one.log_probs) for one in scores)
    with pytest.raises(ValueError, match="a language model has no references"):
        collect_usage(model, TEXTS, TEXTS)


def test_a_multilingual_model_also_reads_a_language_token(tmp_path: Path):
    folder = make_bundle(tmp_path, languages="aa bb", description=SHORT)[0]
    translator = Translator.load(folder)
    one, other = (collect_usage(translator, ["cat"], ["dog"], lang) for lang in ("aa", "bb"))
    # The encoder reads the language token, one or more pieces, and the end mark.
    assert one.layers["encoder"].num_tokens == other.layers["encoder"].num_tokens >= 3
    with pytest.raises(ValueError, match="`target_lang` must be one of aa, bb"):
        collect_usage(translator, ["cat"], ["dog"])


DENSE: dict[str, Any] = {
    "dense": replace(LM, moe=None),
    "deep expert": replace(
        LM, moe=MoEConfig(model_dim=16, hidden_dim=24, num_experts=1, top_k=1), expert_layers=3
    ),
    "translator": replace(GNMT, moe=None),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_has_no_layers(name: str, tmp_path: Path):
    folder = make_bundle(tmp_path, DENSE[name])[0]
    loader = Translator if name == "translator" else LanguageModel
    given = (REFERENCES,) if name == "translator" else ()
    found = collect_usage(loader.load(folder), TEXTS, *given)
    assert found.layers == {}
    assert found.score is not None


def test_unequal_numbers_of_texts_and_references_are_refused(bundle: Path):
    with pytest.raises(ValueError, match="texts is 5, and the number of references is 1"):
        collect_usage(Translator.load(bundle), TEXTS, ["a"])


def test_a_text_of_blank_lines_has_no_score(bundle: Path):
    found = collect_usage(Translator.load(bundle), ["", " "])
    assert found.score is None
    assert found.num_blank == 2
    assert found.layers["encoder"].num_tokens == 0
