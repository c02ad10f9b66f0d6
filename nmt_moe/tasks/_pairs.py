"""Combine the sentences of several language pairs into one data set."""

import math
from typing import Any, Dict, List, Optional

import numpy as np
from fairseq.data import ConcatDataset, Dictionary, LanguagePairDataset

from nmt_moe.training import sentences_of_epoch, sentences_per_epoch


class PairsDataset(LanguagePairDataset):
    """Several language pairs with their language tokens. Training batches mix the pairs.

    Attributes:
        pairs: Names of the pairs, in the order of their sentences.
        passes: During training, the number of passes over each pair in an epoch. Otherwise None:
            every sentence occurs once, and each batch contains only one pair and names it.
        num_folders: Number of data folders, which the epochs use in turn. Each folder is used once
            every `num_folders` epochs.
    """

    # Every epoch draws different sentences.
    can_reuse_epoch_itr_across_epochs = False

    def __init__(
        self,
        parts: Dict[str, LanguagePairDataset],
        dictionary: Dictionary,
        passes: Optional[Dict[str, float]] = None,
        seed: int = 1,
        num_folders: int = 1,
        **options: Any,
    ) -> None:
        """Concatenate the pairs' data sets; `options` are passed to LanguagePairDataset."""
        source = ConcatDataset([part.src for part in parts.values()])
        targets = [part.tgt for part in parts.values() if part.tgt is not None]
        target = ConcatDataset(targets) if targets else None
        super().__init__(
            source,
            source.sizes,
            dictionary,
            target,
            None if target is None else target.sizes,
            dictionary,
            **options,
        )
        self.pairs = list(parts)
        self.passes, self.seed, self.num_folders, self.epoch = passes, seed, num_folders, 1
        self.part_sizes = [len(part) for part in parts.values()]
        self.starts = np.cumsum([0, *self.part_sizes])

    def set_epoch(self, epoch: int) -> None:
        """Set the training epoch to draw sentences for."""
        super().set_epoch(epoch)
        # Count only epochs that use this folder, so that each continues where the previous one
        # ended.
        self.epoch = (epoch - 1) // self.num_folders + 1

    def ordered_indices(self) -> np.ndarray:
        """Return this epoch's indices, sorted by length. Oversampling repeats some of them."""
        if self.passes is None:
            return super().ordered_indices()
        drawn = [
            start + sentences_of_epoch(size, self.passes[pair], self.epoch, self.seed).numpy()
            for pair, start, size in zip(self.pairs, self.starts, self.part_sizes, strict=False)
        ]
        indices = np.random.permutation(np.concatenate(drawn))
        # Sort by source and then target length. Sentences of equal lengths stay in random order.
        return indices[np.lexsort((self.tgt_sizes[indices], self.src_sizes[indices]))]

    def batch_by_size(self, indices: np.ndarray, **limits: Any) -> List[np.ndarray]:
        """Divide indices into batches; outside training, each batch contains one pair."""
        if self.passes is not None:
            return super().batch_by_size(indices, **limits)
        pair = self.pair_of(indices)
        return [
            batch
            for number in range(len(self.pairs))
            for batch in super(PairsDataset, self).batch_by_size(indices[pair == number], **limits)
        ]

    def collater(self, samples: List[Dict], pad_to_length: Optional[Dict] = None) -> Dict[str, Any]:
        """Build a batch; outside training, its `pair` is an index into `pairs`."""
        batch = super().collater(samples, pad_to_length)
        if batch and self.passes is None:
            batch["pair"] = int(self.pair_of(batch["id"][:1].numpy())[0])
        return batch

    def pair_of(self, indices: np.ndarray) -> np.ndarray:
        """Return each sentence's index into `pairs`."""
        return np.searchsorted(self.starts, indices, side="right") - 1


def describe_sampling(dataset: PairsDataset, epochs: float) -> str:
    """Return a table that shows how many times a training run uses each pair.

    Args:
        dataset: The training set.
        epochs: Number of epochs of the whole training run; infinity if no option limits it.
    """
    own_epochs = epochs / dataset.num_folders
    assert dataset.passes is not None
    drawn = {
        pair: sentences_per_epoch(size, dataset.passes[pair])
        for pair, size in zip(dataset.pairs, dataset.part_sizes, strict=True)
    }
    total = sum(drawn.values())
    whole = "no limit" if math.isinf(epochs) else f"{epochs:.2f}"
    lines = [
        f"sampling: {total} sentences per epoch; epochs of this run: {whole}",
        f"  {'pair':<8}{'sentences':>11}{'per epoch':>11}{'share':>8}"
        f"{'passes/epoch':>14}{'total passes':>15}",
    ]
    for pair, size in zip(dataset.pairs, dataset.part_sizes, strict=True):
        passes = drawn[pair] / size
        in_all = "no limit" if math.isinf(epochs) else f"{passes * own_epochs:.2f}"
        lines.append(
            f"  {pair:<8}{size:>11}{drawn[pair]:>11}{drawn[pair] / total:>8.1%}"
            f"{passes:>14.2f}{in_all:>15}"
        )
    return "\n".join(lines)
