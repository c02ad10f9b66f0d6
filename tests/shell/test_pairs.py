"""The choice of the sentences that an epoch contains."""

from collections import Counter

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, LanguagePairDataset, ListDataset

from nmt_moe import plugin

plugin.register()

from nmt_moe.tasks._pairs import PairsDataset  # noqa: E402


def make_pairs(passes: float, num_folders: int) -> PairsDataset:
    """Make a data set of one pair with 8 sentences of 1 to 8 tokens."""
    dictionary = Dictionary()
    sentences = [torch.full((length + 1,), dictionary.eos()) for length in range(8)]
    side = ListDataset(sentences, np.arange(1, 9))
    part = LanguagePairDataset(side, side.sizes, dictionary, side, side.sizes, dictionary)
    return PairsDataset({"aa-bb": part}, dictionary, {"aa-bb": passes}, 1, num_folders)


@pytest.mark.parametrize("num_folders", [1, 2, 3])
@pytest.mark.parametrize("passes", [0.25, 0.5, 1.0, 1.5])
def test_counts_of_sentences_differ_by_at_most_one_in_each_folder(passes: float, num_folders: int):
    folders = [make_pairs(passes, num_folders) for _ in range(num_folders)]
    drawn = [Counter(range(8)) for _ in folders]
    for epoch in range(1, 13):
        number = (epoch - 1) % num_folders
        folders[number].set_epoch(epoch)
        drawn[number].update(folders[number].ordered_indices().tolist())
        assert all(max(count.values()) - min(count.values()) <= 1 for count in drawn)
