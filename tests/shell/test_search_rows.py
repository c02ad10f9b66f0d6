"""What a search evaluates: each sentence's encoding once, and only hypotheses that go on."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator

from nmt_moe.compat.live_rows import LiveRowsEnsemble
from tests.support.enumeration import DICTIONARY, UNUSED
from tests.support.models import make_tokens
from tests.support.searching import make_models, scores, search

SOURCES = ["cab", "abcdefghij", "j", "ab"]
BEAM = 5
OPTIONS = {"beam_size": BEAM, "max_len_b": 9}


def search_as_fairseq(models: list[Any], *sources: str, **options: Any) -> list[list[dict]]:
    generator = SequenceGenerator(
        models, DICTIONARY, tokens_to_suppress=UNUSED, unk_penalty=math.inf, **options
    )
    src_tokens, src_lengths = make_tokens(*sources)
    sample = {"net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths}}
    return generator.generate(models, sample)


def search_with_penalties(models: list[Any], *sources: str, **options: Any) -> list[list[dict]]:
    penalties = {"length_penalty_alpha": 0.2, "coverage_penalty_beta": 0.2}
    return search(models, *sources, **penalties, **options)


def search_with_pruning(models: list[Any], *sources: str, **options: Any) -> list[list[dict]]:
    return search(models, *sources, beam_prune=1.0, **options)


SEARCHES = [search_as_fairseq, search_with_penalties, search_with_pruning]
Search = Callable[..., list[list[dict]]]


def count_rows(module: torch.nn.Module, at: int = 0, axis: int = 0) -> list[int]:
    """Give a list that grows by the rows of each call, read from an argument's shape."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[at].shape[axis]))
    return rows


def decoder_of(model: Any) -> torch.nn.Module:
    # fairseq calls `decoder.forward` itself, past the hooks of the decoder.
    return model.decoder.network


@pytest.mark.parametrize("find", SEARCHES)
def test_the_encoder_and_the_keys_of_attention_see_each_sentence_once(find: Search):
    models = make_models()
    encoder = models[0].encoder.network
    encoded, keyed = count_rows(encoder), count_rows(encoder.attention_keys)
    find(models, *SOURCES, **OPTIONS)
    assert encoded == keyed == [len(SOURCES)]


@pytest.mark.parametrize("find", SEARCHES)
def test_experts_see_all_hypotheses_of_a_step_at_once(find: Search):
    models = make_models()
    decoder = decoder_of(models[0])
    steps = count_rows(decoder)
    calls = count_rows(decoder.moe, axis=1)  # (1, R, D)
    find(models, *SOURCES, **OPTIONS)
    assert calls == steps
    assert len(steps) == OPTIONS["max_len_b"] + 1


@pytest.mark.parametrize("find", [search_as_fairseq, search_with_penalties])
def test_finished_sentences_leave_the_batch(find: Search, monkeypatch: pytest.MonkeyPatch):
    models = make_models()
    forward = models[0].decoder.forward

    def forward_to_the_end(*args: Any, **options: Any) -> tuple:
        logits, extra = forward(*args, **options)
        logits[..., DICTIONARY.eos()] += 1.0  # so that some sentences end early
        return logits, extra

    monkeypatch.setattr(models[0].decoder, "forward", forward_to_the_end)
    rows = count_rows(decoder_of(models[0]))
    found = find(models, *SOURCES, beam_size=2, max_len_b=9)
    # A sentence is finished when its last hypothesis ends.
    steps = [max(len(one["tokens"]) for one in hypotheses) for hypotheses in found]
    assert rows == [2 * sum(step < last for last in steps) for step in range(max(steps))]
    assert len(set(steps)) > 1


def test_pruned_hypotheses_leave_the_batch(monkeypatch: pytest.MonkeyPatch):
    alive = []
    step = LiveRowsEnsemble.reorder_incremental_state

    def noting(self: LiveRowsEnsemble, states: Any, new_order: torch.Tensor) -> None:
        alive.append(int(self.read_alive().sum()))
        step(self, states, new_order)

    monkeypatch.setattr(LiveRowsEnsemble, "reorder_incremental_state", noting)
    models = make_models()
    rows = count_rows(decoder_of(models[0]))
    search_with_pruning(models, *SOURCES, **OPTIONS)
    # At the first step all rows of a sentence are equal.
    assert rows == [len(SOURCES), *alive]
    assert sum(rows) < BEAM * len(SOURCES) * len(rows) / 2


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("ensemble", [1, 2])
def test_leaving_dead_rows_out_changes_no_result(
    margin: float, ensemble: int, monkeypatch: pytest.MonkeyPatch
):
    models = make_models(ensemble)
    options = {"length_penalty_alpha": 0.2, "coverage_penalty_beta": 0.5, "beam_prune": margin}
    rows = count_rows(decoder_of(models[0]))
    found = search(models, *SOURCES, **options, **OPTIONS)
    evaluated = sum(rows)
    rows.clear()
    # As of attention that takes its rows W by W.
    monkeypatch.setattr(models[0].decoder.output, "beam_size", BEAM, raising=False)
    whole = search(models, *SOURCES, **options, **OPTIONS)
    assert evaluated < sum(rows)
    assert set(rows) <= {BEAM * count for count in range(1, len(SOURCES) + 1)}
    for one, other in zip(found, whole, strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-4)
        for mine, same in zip(one, other, strict=True):
            torch.testing.assert_close(mine["attention"], same["attention"], atol=1e-4, rtol=0)
