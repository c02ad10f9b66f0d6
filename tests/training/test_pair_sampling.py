"""How often training uses each pair, worked out by hand and counted over many epochs."""

import pytest

from nmt_moe.training import passes_per_epoch, sentences_of_epoch, sentences_per_epoch

SIZES = {"en-fr": 8, "en-ko": 2}


def test_at_temperature_1_every_pair_is_seen_once():
    assert passes_per_epoch(SIZES) == pytest.approx({"en-fr": 1.0, "en-ko": 1.0})


def test_temperature_2_by_hand():
    # The shares of N = 10 are 0.8 and 0.2. Their square roots are in the ratio 2 to 1, so an epoch
    # draws 10 * 2/3 sentences from the pair with 8, and 10 * 1/3 from the pair with 2.
    assert passes_per_epoch(SIZES, 2.0) == pytest.approx({"en-fr": 20 / 24, "en-ko": 10 / 6})


def test_a_high_temperature_gives_equal_shares():
    passes = passes_per_epoch(SIZES, 1e9)
    assert passes == pytest.approx({"en-fr": 5 / 8, "en-ko": 5 / 2})


def test_oversampling_replaces_only_the_passes_of_its_pairs():
    expected = {"en-fr": 20 / 24, "en-ko": 7.0}
    assert passes_per_epoch(SIZES, 2.0, {"en-ko": 7.0}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SIZES, 0.5), "`sampling_temperature` must be at least 1.0, but is 0.5"),
        ((SIZES, float("nan")), "`sampling_temperature` must be at least 1.0, but is nan"),
        (({"en-fr": 0},), "`sentences of en-fr` must be at least 1, but is 0"),
        ((SIZES, 1.0, {"fr-en": 2.0}), "a pair must be one of en-fr, en-ko, but is 'fr-en'"),
        (
            (SIZES, 1.0, {"en-ko": 0.0}),
            "for en-ko must be a finite number greater than 0, but is 0",
        ),
        ((SIZES, 1.0, {"en-ko": float("inf")}), "a finite number greater than 0, but is inf"),
    ],
)
def test_impossible_settings_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        passes_per_epoch(*arguments)


def test_one_pass_contains_every_sentence_once():
    assert sorted(sentences_of_epoch(7, 1.0, epoch=3, seed=1).tolist()) == list(range(7))


@pytest.mark.parametrize("passes", [0.1, 0.4, 1.0, 1.7, 3.0])
def test_over_all_epochs_counts_of_sentences_differ_by_at_most_one(passes: float):
    counts = [0] * 7
    for epoch in range(1, 12):
        drawn = sentences_of_epoch(7, passes, epoch, seed=5).tolist()
        assert len(drawn) == sentences_per_epoch(7, passes)
        for sentence in drawn:
            counts[sentence] += 1
        assert max(counts) - min(counts) <= 1


def test_a_pair_too_small_for_its_share_gives_one_sentence_per_epoch():
    assert sentences_per_epoch(2, 0.01) == 1
    assert len(sentences_of_epoch(2, 0.01, epoch=9, seed=1)) == 1


def test_an_epoch_is_always_the_same_for_a_seed_and_differs_between_seeds():
    drawn = sentences_of_epoch(50, 1.5, epoch=4, seed=2)
    assert drawn.equal(sentences_of_epoch(50, 1.5, epoch=4, seed=2))
    assert not drawn.equal(sentences_of_epoch(50, 1.5, epoch=5, seed=2))
    assert not drawn.equal(sentences_of_epoch(50, 1.5, epoch=4, seed=3))
