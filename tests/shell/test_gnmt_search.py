"""GNMT's search in fairseq's generator, compared with an enumeration of all translations."""

import math
from argparse import Namespace
from typing import Any

import pytest
import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.fairseq_task import FairseqTask

from nmt_moe.generation.generator import GNMTGenerator
from nmt_moe.search import SearchConfig
from tests.support.enumeration import (
    BEAM,
    DICTIONARY,
    LONGEST,
    UNUSED,
    enumerate_translations,
    force,
    prune,
)
from tests.support.models import make_tokens
from tests.support.searching import make_models, scores, search, text

SOURCE = "abcde"
PENALTIES = [(0.2, 0.0), (0.0, 0.2), (0.2, 0.2), (1.0, 0.0), (0.6, 1.5)]


@pytest.mark.parametrize("ensemble", [1, 2])
@pytest.mark.parametrize(("alpha", "beta"), PENALTIES)
def test_a_wide_beam_ranks_all_translations_like_their_enumeration(
    alpha: float, beta: float, ensemble: int
):
    models = make_models(ensemble)
    expected = {one.text: one.score(alpha, beta) for one in enumerate_translations(models, SOURCE)}
    options = {"length_penalty_alpha": alpha, "coverage_penalty_beta": beta}
    found = scores(search(models, SOURCE, **options)[0])
    assert found == pytest.approx(expected, abs=1e-4)
    assert next(iter(found)) == max(expected, key=expected.__getitem__)


def test_the_penalties_choose_different_translations():
    translations = enumerate_translations(make_models(), SOURCE)
    penalties = [(0.0, 0.0), *PENALTIES]
    best = {max(translations, key=lambda one: one.score(*pair)).text for pair in penalties}  # noqa: B023
    assert len(best) > 1


def test_coverage_is_that_of_the_hypothesis_it_scores():
    # With a narrow beam and long translations, rows change places at most steps.
    models = make_models()
    options = {"length_penalty_alpha": 0.4, "coverage_penalty_beta": 2.0}
    hypotheses = search(models, SOURCE, beam_size=6, max_len_b=9, **options)[0]
    expected = {one: force(models, SOURCE, one).score(0.4, 2.0) for one in scores(hypotheses)}
    assert scores(hypotheses) == pytest.approx(expected, abs=1e-4)
    coverages = {force(models, SOURCE, one).score(0.0, 1.0) for one in expected}
    assert len(coverages) == len(expected) == 6


@pytest.mark.parametrize("pad_left", [True, False])
@pytest.mark.parametrize("prune_margin", [0.0, 2.0])
def test_a_sentence_scores_the_same_alone_and_with_longer_ones(pad_left: bool, prune_margin: float):
    models = make_models()
    options = {"length_penalty_alpha": 0.2, "coverage_penalty_beta": 0.5, "beam_size": 5}
    options |= {"max_len_b": 8, "beam_prune": prune_margin}
    sources = ["cab", "abcdefghij", "j"]
    together = search(models, *sources, pad_left=pad_left, **options)
    for source, hypotheses in zip(sources, together, strict=True):
        alone = scores(search(models, source, **options)[0])
        assert scores(hypotheses) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_pruning_keeps_what_its_definition_keeps(margin: float, alpha: float):
    models = make_models()
    everything = enumerate_translations(models, SOURCE)
    expected = {one.text: one.score(alpha, 0.0) for one in prune(everything, margin, alpha)}
    found = search(models, SOURCE, length_penalty_alpha=alpha, beam_prune=margin)[0]
    assert scores(found) == pytest.approx(expected, abs=1e-4)
    assert 1 <= len(expected) < len(everything)


def test_a_wide_margin_prunes_nothing():
    models = make_models()
    options = {"length_penalty_alpha": 0.2, "coverage_penalty_beta": 0.2, "beam_size": 5}
    options["max_len_b"] = 12
    pruned = search(models, "abc", "abcdefg", beam_prune=1e6, **options)
    plain = search(models, "abc", "abcdefg", **options)
    for one, other in zip(pruned, plain, strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-5)


def test_pruning_without_penalties_keeps_fairseqs_scores():
    models = make_models()
    options = {"beam_size": 5, "max_len_b": 12, "len_penalty": 0.7}
    pruned = search(models, "abc", beam_prune=1e6, **options)[0]
    generator = SequenceGenerator(
        models, DICTIONARY, tokens_to_suppress=UNUSED, unk_penalty=math.inf, **options
    )
    src_tokens, src_lengths = make_tokens("abc")
    sample = {"net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths}}
    plain = generator.generate(models, sample)[0]
    assert scores(pruned) == pytest.approx(scores(plain), abs=1e-5)


def test_pruning_ends_the_search_early(monkeypatch: pytest.MonkeyPatch):
    models = make_models()
    steps = []
    forward = models[0].decoder.forward

    def forward_to_the_end(*args: Any, **options: Any) -> tuple:
        steps.append(1)
        logits, extra = forward(*args, **options)
        logits[..., DICTIONARY.eos()] += 8.0  # the untrained model rarely ends a translation
        return logits, extra

    monkeypatch.setattr(models[0].decoder, "forward", forward_to_the_end)
    options = {"length_penalty_alpha": 0.2, "beam_size": 8, "max_len_b": 60}
    plain = search(models, SOURCE, "abc", **options)
    steps_of_plain = len(steps)
    pruned = search(models, SOURCE, "abc", beam_prune=1.0, **options)
    assert len(steps) - steps_of_plain < steps_of_plain
    assert [text(one[0]) for one in pruned] == [text(one[0]) for one in plain]


def test_a_prefix_is_kept_and_scored():
    models = make_models()
    src_tokens, src_lengths = make_tokens(SOURCE, "ab")
    sample = {"net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths}}
    prefix = torch.tensor([[DICTIONARY.index(letter)] for letter in "cb"])
    for margin in (0.0, 1.0):
        config = SearchConfig(0.2, 0.2, margin)
        generator = GNMTGenerator(
            models,
            DICTIONARY,
            config,
            tokens_to_suppress=UNUSED,
            unk_penalty=math.inf,
            beam_size=BEAM,
            max_len_b=LONGEST,
        )
        found = generator.generate(models, sample, prefix_tokens=prefix)
        for source, first, hypotheses in zip((SOURCE, "ab"), "cb", found, strict=True):
            expected = {
                one: force(models, source, one).score(0.2, 0.2) for one in scores(hypotheses)
            }
            assert all(one.startswith(first) for one in expected)
            assert scores(hypotheses) == pytest.approx(expected, abs=1e-4)


def test_attention_that_does_not_cover_the_source_is_refused():
    models = make_models()
    forward = models[0].decoder.forward

    def without_attention(*args: Any, **options: Any) -> tuple:
        return forward(*args, **options)[0], {"attn": None}

    models[0].decoder.forward = without_attention
    with pytest.raises(ValueError, match="attention over the 6 source positions.*returns none"):
        search(models, SOURCE, coverage_penalty_beta=0.2)
    assert search(models, SOURCE, length_penalty_alpha=0.2)


def test_a_source_that_is_not_text_is_refused():
    models = make_models()
    generator = GNMTGenerator(models, DICTIONARY, SearchConfig(coverage_penalty_beta=0.2))
    sample = {"net_input": {"source": torch.zeros(1, 5), "padding_mask": None}}
    with pytest.raises(ValueError, match="`--coverage-penalty-beta` counts the words of a source"):
        generator.generate(models, sample)


class SomeTask(FairseqTask):
    """The part of a task that `build_generator` uses."""

    @property
    def target_dictionary(self) -> Any:
        return DICTIONARY


def build(**options: Any) -> Any:
    return SomeTask(Namespace()).build_generator(make_models(), Namespace(beam=3, **options))


@pytest.mark.parametrize("options", [{}, {"length_penalty_alpha": 0.0, "beam_prune": 0.0}])
def test_with_all_options_off_the_generator_is_fairseqs_own(options: dict[str, float]):
    generator = build(**options)
    assert type(generator) is SequenceGenerator
    assert type(generator.search) is BeamSearch


def test_any_namespace_of_options_builds_the_search():
    generator = build(length_penalty_alpha=0.2, beam_prune=3.0, max_len_b=7)
    assert type(generator) is GNMTGenerator
    assert generator.search_config == SearchConfig(0.2, 0.0, 3.0)
    assert (generator.beam_size, generator.max_len_b) == (3, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_penalty_alpha": math.nan}, "`--length-penalty-alpha` must be .* but is nan"),
        ({"beam_prune": 3.0, "sampling": True}, "`--sampling` is another way"),
        ({"beam_prune": 3.0, "diverse_beam_groups": 2}, "`--diverse-beam-groups` is another way"),
        ({"beam_prune": 3.0, "constraints": "ordered"}, "`--constraints`"),
        ({"length_penalty_alpha": 0.2, "lenpen": 0.6}, "replaces `--lenpen`, which is 0.6"),
        ({"coverage_penalty_beta": 0.2, "unnormalized": True}, "leave `--unnormalized` out"),
        ({"coverage_penalty_beta": 0.2, "score_reference": True}, "`--score-reference` is another"),
    ],
)
def test_incompatible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_task_with_its_own_search_is_refused():
    with pytest.raises(ValueError, match="The task SomeTask has its own search"):
        SomeTask(Namespace()).build_generator(
            make_models(), Namespace(beam_prune=1.0), seq_gen_cls=SequenceGenerator
        )
