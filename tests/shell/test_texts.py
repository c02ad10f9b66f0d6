"""The repairs to the splitting of a text into samples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data import TokenBlockDataset, token_block_dataset
from fairseq.tasks import language_modeling

from nmt_moe import plugin
from nmt_moe.compat.samples import (
    MOST_TOKENS,
    check_line_lengths,
    let_each_sentence_be_a_sample,
    name_endless_lines,
)

plugin.register()


def test_each_sentence_is_a_sample():
    lines = [torch.tensor([5, 6, 2]), torch.tensor([7, 2])]
    blocks = TokenBlockDataset(lines, [3, 2], 10, pad=1, eos=2, break_mode="eos")
    assert [block.tolist() for block in blocks] == [[5, 6, 2], [7, 2]]


def test_a_numpy_that_has_the_attribute_is_not_changed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(np, "compat", SimpleNamespace(long=int), raising=False)
    monkeypatch.setattr(token_block_dataset, "np", np)
    let_each_sentence_be_a_sample()
    assert token_block_dataset.np is np


def test_a_repair_is_applied_only_once():
    before = (
        token_block_dataset.np,
        language_modeling.TokenBlockDataset,
    )
    let_each_sentence_be_a_sample()
    name_endless_lines()
    assert before == (
        token_block_dataset.np,
        language_modeling.TokenBlockDataset,
    )


def test_the_longest_line_that_can_be_counted_is_accepted_but_not_one_token_more():
    check_line_lengths("text", np.array([3, MOST_TOKENS]))
    with pytest.raises(
        ValueError, match="`text`, line 2: .* at most 65535 tokens, but this one has 65536"
    ):
        check_line_lengths("text", np.array([3, MOST_TOKENS + 1, 4]))


def test_blocks_of_many_tokens_may_hold_long_sentences():
    # With --tokens-per-sample 65535 or more, fairseq counts with 32 bits.
    lines = [torch.full((MOST_TOKENS + 5,), 5)]
    cut = language_modeling.TokenBlockDataset
    blocks = cut(lines, [MOST_TOKENS + 5], 70_000, pad=1, eos=2, break_mode="eos")
    assert blocks.sizes.tolist() == [MOST_TOKENS + 5]
    with pytest.raises(ValueError, match="`the input`, line 1"):
        cut(lines, [MOST_TOKENS + 5], 1000, pad=1, eos=2, break_mode="eos")
    blocks = cut(lines, [MOST_TOKENS + 5], 1000, pad=1, eos=2, break_mode="none")
    assert blocks.sizes.sum() == MOST_TOKENS + 5
