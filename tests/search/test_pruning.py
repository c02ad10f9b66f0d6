"""Pruning, worked out by hand."""

import math

import torch

from nmt_moe.search import best_attainable, length_penalty, mask_tokens, within_margin

DEAD = -math.inf


def test_tokens_far_below_the_sentences_best_are_ruled_out():
    log_probs = torch.tensor(
        [
            [[-0.1, -3.0, -3.2], [-2.0, -4.0, -1.0]],  # best -0.1
            [[-9.0, -9.5, -13.0], [-10.0, -12.5, DEAD]],  # another sentence, best -9
        ]
    )
    kept = mask_tokens(log_probs, torch.ones(2, 2, dtype=torch.bool), margin=3.0)
    expected = [
        [[-0.1, -3.0, DEAD], [-2.0, DEAD, -1.0]],
        [[-9.0, -9.5, DEAD], [-10.0, DEAD, DEAD]],
    ]
    torch.testing.assert_close(kept, torch.tensor(expected))


def test_a_dead_hypothesis_does_not_count_as_the_best():
    log_probs = torch.tensor([[[-0.1, -5.0], [-6.0, -7.0]]])
    kept = mask_tokens(log_probs, torch.tensor([[False, True]]), margin=3.0)
    assert kept[0, 1].isfinite().all()


def test_the_best_token_stays_whatever_the_margin():
    log_probs = torch.randn(4, 3, 11, generator=torch.manual_seed(1)).log_softmax(2)
    kept = mask_tokens(log_probs, torch.ones(4, 3, dtype=torch.bool), margin=0.0)
    assert (kept.isfinite().sum(dim=(1, 2)) == 1).all()
    torch.testing.assert_close(kept.amax(dim=(1, 2)), log_probs.amax(dim=(1, 2)))


def test_a_token_at_the_margin_is_kept():
    near = within_margin(torch.tensor([-1.0, -4.0, -4.1]), -1.0, margin=3.0)
    assert near.tolist() == [True, True, False]


def test_no_continuation_beats_the_bound():
    log_probability = torch.tensor([-6.0])
    bound = best_attainable(log_probability, length_penalty(4, 0.6), length_penalty(9, 0.6))
    for length in range(4, 10):
        assert (log_probability - 0.01 * length) / length_penalty(length, 0.6) < bound
