"""The beam search, compared with a naive one and with cases worked out by hand."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nmt_moe.search import BeamConfig, Restrictions, SearchConfig, beam_search
from tests.support.naive_search import (
    EOS,
    PAD,
    Sentences,
    Stepping,
    make_model,
    naive_search,
)

B = 5
CONFIGS = [
    SearchConfig(),
    SearchConfig(length_penalty_alpha=0.6),
    SearchConfig(0.2, 0.4),
    SearchConfig(beam_prune=1.0),
    SearchConfig(0.2, 0.2, 2.0),
    SearchConfig(1.0, 0.0, 0.5),
]


def search(step: Any, config: BeamConfig, limits: list[int], **options: Any) -> list[list]:
    numbers = torch.arange(len(limits))
    restrictions = Restrictions(EOS, PAD, torch.tensor(limits), **options)
    words = torch.ones(len(limits), 4, dtype=torch.bool)
    start = torch.full_like(numbers, EOS)
    return beam_search(step, Sentences(numbers), start, config, restrictions, words)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_hypotheses_scores_and_evaluated_rows_are_those_of_the_naive_search(
    width: int, config: SearchConfig
):
    limits = [7, 3, 9, 6, 2]
    for seed in range(2):
        model = make_model(seed=seed)
        beam = BeamConfig(width, search=config)
        step = Stepping(model)
        found = search(step, beam, limits)
        plain = [naive_search(model, number, beam, limits[number]) for number in range(B)]
        for mine, (expected, _) in zip(found, plain, strict=True):
            assert [tuple(one.tokens.tolist()) for one in mine] == [one.tokens for one in expected]
            for one, other in zip(mine, expected, strict=True):
                assert float(one.score) == pytest.approx(other.score, abs=1e-5)
                assert one.positional_scores.tolist() == pytest.approx(other.log_probs, abs=1e-5)
                torch.testing.assert_close(one.attention.t(), other.attention)
        # Finished sentences and pruned rows are removed, so only live hypotheses are evaluated.
        steps = itertools.zip_longest(*(evaluated for _, evaluated in plain), fillvalue=set())
        assert step.evaluated == [set.union(*one) for one in steps]


def test_a_sentence_gets_the_same_results_in_any_batch():
    model, beam = make_model(), BeamConfig(3, search=SearchConfig(0.2, 0.2, 3.0))
    limits = [7, 3, 9, 6, 2]
    together = search(Stepping(model), beam, limits)
    for number, limit in enumerate(limits):
        moved = lambda tokens, sentences, number=number: model(tokens, sentences + number)  # noqa: E731
        (alone,) = search(Stepping(moved), beam, [limit])
        for one, other in zip(alone, together[number], strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.score, other.score)


def test_minimum_length_prefixes_and_suppressed_tokens_are_respected():
    prefixes = torch.tensor([[5, 6, PAD], [7, PAD, PAD], [PAD, PAD, PAD], [8, EOS, PAD]])
    options = {"min_length": 3, "prefixes": prefixes, "suppressed": (4, 6)}
    found = search(Stepping(make_model()), BeamConfig(4), [6, 6, 6, 6], **options)
    firsts = [{tuple(one.tokens[:2].tolist()) for one in hypotheses} for hypotheses in found]
    assert firsts[0] == {(5, 6)}
    assert {first for first, _ in firsts[1]} == {7}
    assert firsts[3] == {(8, EOS)}  # the prefix takes precedence over the minimum length
    assert [len(one.tokens) for one in found[3]] == [2]
    for number, free in ((0, 2), (1, 1), (2, 0)):
        for one in found[number]:
            assert 4 <= len(one.tokens) <= 7
            assert not {4, 6} & set(one.tokens[free:].tolist())


def test_a_prefix_changes_no_other_sentence():
    model = make_model()
    free = search(Stepping(model), BeamConfig(3), [6, 6], min_length=2)
    prefixes = torch.tensor([[5, 6, 7], [PAD, PAD, PAD]])
    mixed = search(Stepping(model), BeamConfig(3), [6, 6], min_length=2, prefixes=prefixes)
    assert [one.tokens.tolist() for one in mixed[1]] == [one.tokens.tolist() for one in free[1]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_repeated(size: int):
    found = search(Stepping(make_model(vocab=6)), BeamConfig(4), [9] * B, no_repeat_ngram_size=size)
    free = search(Stepping(make_model(vocab=6)), BeamConfig(4), [9] * B)
    repeats = []
    for hypotheses in (found, free):
        words = [one.tokens.tolist() for of_sentence in hypotheses for one in of_sentence]
        ngrams = [list(zip(*(one[shift:] for shift in range(size)), strict=False)) for one in words]
        repeats.append(sum(len(set(one)) < len(one) for one in ngrams))
    assert repeats[0] == 0 < repeats[1]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("most", [1, 2, 9])
def test_only_the_best_hypotheses_are_returned_if_fewer_are_wanted(config: SearchConfig, most: int):
    limits = [7, 3, 9, 6, 2]
    every = search(Stepping(make_model()), BeamConfig(5, search=config), limits)
    beam = BeamConfig(5, search=config, num_hypotheses=most)
    for few, whole in zip(search(Stepping(make_model()), beam, limits), every, strict=True):
        assert len(few) == min(most, len(whole))
        for one, other in zip(few, whole, strict=False):
            assert one.tokens.equal(other.tokens)
            assert one.score.equal(other.score)
            assert one.positional_scores.equal(other.positional_scores)
            assert one.attention.equal(other.attention)


@pytest.mark.parametrize("name", ["beam_size", "num_hypotheses"])
def test_zero_hypotheses_are_refused(name: str):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, but is 0"):
        BeamConfig(**{name: 0})


def test_unknown_words_cost_their_penalty():
    plain = search(Stepping(make_model()), BeamConfig(40), [3])[0]
    paid = search(Stepping(make_model()), BeamConfig(40), [3], unk=3, unk_penalty=0.5)[0]
    scores = {tuple(one.tokens.tolist()): float(one.positional_scores.sum()) for one in plain}
    for one in paid:
        tokens = tuple(one.tokens.tolist())
        if tokens in scores:
            expected = scores[tokens] - 0.5 * tokens.count(3)
            assert float(one.positional_scores.sum()) == pytest.approx(expected, abs=1e-5)
    assert any(3 in one.tokens.tolist() for one in paid)
    never = search(Stepping(make_model()), BeamConfig(40), [3], unk=3, unk_penalty=torch.inf)[0]
    assert not any(3 in one.tokens.tolist() for one in never)


def test_equal_candidates_are_taken_in_the_order_of_rows_and_tokens():
    def undecided(tokens: Tensor, state: Sentences) -> tuple[Tensor, None, Sentences]:
        return torch.full((len(tokens), 500), -1.0), None, state

    for count in (1, 3, 70):
        found = search(undecided, BeamConfig(3), [2] * count, min_length=2)
        for hypotheses in found:
            # The tokens are 0, 3 and 4, because 1 is padding and 2 is the end mark.
            assert [one.tokens.tolist() for one in hypotheses] == [[0, 0, 2], [0, 3, 2], [0, 4, 2]]
            assert hypotheses[0].attention is None


def test_half_precision_scores_are_summed_in_float32():
    def halves(tokens: Tensor, state: Sentences) -> tuple[Tensor, None, Sentences]:
        log_probs, _ = make_model()(tokens, state.numbers)
        return log_probs.half(), None, state

    best = search(halves, BeamConfig(2), [9], min_length=9)[0][0]
    assert best.score.dtype == best.positional_scores.dtype == torch.float32
    assert float(best.score) * 10 == pytest.approx(float(best.positional_scores.sum()), abs=1e-4)


@pytest.mark.parametrize("width", [1, 4])
def test_a_model_whose_output_is_not_a_number_is_refused(width: int):
    def broken(tokens: Tensor, state: Sentences) -> tuple[Tensor, None, Sentences]:
        log_probs, _ = make_model()(tokens, state.numbers)
        log_probs[state.numbers == 1] = torch.nan
        return log_probs, None, state

    with pytest.raises(ValueError, match="sentence 2 of the batch has no translation"):
        search(broken, BeamConfig(width), [5, 5, 5])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`beam_size` must be at least 1, but is 0"):
        BeamConfig(0)
    with pytest.raises(ValueError, match="`min_length` .* of 4 tokens, but is 5"):
        Restrictions(EOS, PAD, torch.tensor([7, 4]), min_length=5)
