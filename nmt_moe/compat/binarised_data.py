"""Write digests of binarised data, and check loaded data against them and the dictionary."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.binarizer import FileBinarizer
from fairseq.data import indexed_dataset
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset

from nmt_moe.compat._replace import replace
from nmt_moe.compat.preprocessing import MANY_UNKNOWN_PERCENT, warn_of_unknown_words
from nmt_moe.text.digests import check_digests, write_digests

CHECKED_AT_ONCE = 1 << 22
WAY_OUT = "Binarise the text again with fairseq-preprocess."


def write_digests_of_binarised_data() -> None:
    """Let fairseq-preprocess write the SHA-256 hashes of its output to `.sha256` files.

    Reason: damaged data silently decode to other sentences. `sha256sum -c` can also check the
    digests.
    """
    replace(FileBinarizer, "multiprocess_dataset", _writing)


def _writing(binarize: Callable) -> Callable:
    def write_with_digests(
        input_file: str, dataset_impl: str, binarizer: Any, output_prefix: str, **kwargs: Any
    ) -> Any:
        summary = binarize(input_file, dataset_impl, binarizer, output_prefix, **kwargs)
        files = [Path(f"{output_prefix}.{kind}") for kind in ("bin", "idx")]
        # Token ids mean nothing without the dictionary: `dict.en.txt` for `train.en-de.en`.
        _, *language = files[0].stem.rsplit(".", 1)
        dictionary = files[0].with_name(".".join(["dict", *language, "txt"]))
        write_digests(
            Path(f"{output_prefix}.sha256"), [*files, *filter(Path.is_file, [dictionary])]
        )
        return summary

    return write_with_digests


def check_binarised_data_when_loaded() -> None:
    """Report a file of binarised data that is empty, damaged or made with a different dictionary.

    Reason: an empty file causes the error "cannot mmap an empty file", a truncated file causes a
    traceback in the middle of an epoch, and an unknown token causes an IndexError in the embedding.
    Other damage goes unnoticed.
    """
    replace(indexed_dataset, "make_dataset", _loading)


def _loading(make: Callable) -> Callable:
    def make_dataset(
        path: str, impl: str, fix_lua_indexing: bool = False, dictionary: Any = None
    ) -> Any:
        check_files(path)
        try:
            dataset = make(path, impl, fix_lua_indexing, dictionary)
        except (AssertionError, ValueError) as error:
            if impl != "mmap":
                raise
            raise ValueError(f"`{path}.idx` is damaged: {error}. {WAY_OUT}") from error
        if isinstance(dataset, MMapIndexedDataset):
            check_index(path, dataset)
            if dictionary is not None:
                check_tokens(path, dataset, dictionary)
        return dataset

    return make_dataset


def drop_damaged_data_quietly() -> None:
    """Print nothing when data that could not be opened are freed.

    Reason: "Exception ignored in ... __del__" and a traceback would follow the message.
    """
    for owner in (MMapIndexedDataset, MMapIndexedDataset.Index):
        replace(owner, "__del__", _dropping)


def _dropping(drop: Callable) -> Callable:
    def __del__(data: Any) -> None:  # noqa: N807
        if hasattr(data, "_bin_buffer_mmap"):
            drop(data)

    return __del__


def check_files(path: str) -> None:
    """Compare files with the digests that fairseq-preprocess wrote, if there are any.

    Args:
        path: Path of the data, without `.bin` and `.idx`.

    Raises:
        ValueError: if a file is empty or damaged. The message names it.
    """
    if os.path.isfile(f"{path}.bin") and os.path.getsize(f"{path}.bin") == 0:
        raise ValueError(
            f"`{path}.bin` contains no sentences: the text that fairseq-preprocess read was empty. "
            "Binarise a text of at least one line."
        )
    check_digests(Path(f"{path}.sha256"), "fairseq-preprocess", WAY_OUT)


def check_index(path: str, dataset: MMapIndexedDataset) -> None:
    """Reject data if the sentences are not where the index says.

    Raises:
        ValueError: if a sentence cannot be read. The message names the file and the first such
            sentence, counted from 0.
    """
    sizes, starts = dataset.sizes.astype(np.int64), dataset._index._pointers
    ends = np.cumsum(sizes) * np.dtype(dataset._index.dtype).itemsize
    wanted = np.concatenate([[0], ends[:-1]])
    file_size = os.path.getsize(f"{path}.bin")
    bad = np.flatnonzero((sizes < 0) | (starts != wanted) | (ends > file_size))
    if len(bad):
        raise ValueError(
            f"sentence #{bad[0]} of `{path}.bin` cannot be read: the file has {file_size} bytes, "
            f"but `{path}.idx` expects {ends[-1]}. One of them is damaged. {WAY_OUT}"
        )


def check_tokens(path: str, dataset: MMapIndexedDataset, dictionary: Dictionary) -> None:
    """Reject tokens that are not in the dictionary; warn if many of them are the unknown word.

    Raises:
        ValueError: if the dictionary lacks a token. The message names the first sentence that
            contains it, counted from 0.
    """
    num_tokens = num_unknown = 0
    for tokens in _chunks(dataset):
        outside = np.flatnonzero((tokens < 0) | (tokens >= len(dictionary)))
        if len(outside):
            token = num_tokens + outside[0]
            sentence = np.searchsorted(np.cumsum(dataset.sizes), token, side="right")
            raise ValueError(
                f"sentence #{sentence} of `{path}.bin` has the token {tokens[outside[0]]}, but the "
                f"dictionary has {len(dictionary)} symbols: the data are damaged, or were "
                f"binarised with another dictionary. {WAY_OUT}"
            )
        num_tokens += len(tokens)
        num_unknown += int(np.count_nonzero(tokens == dictionary.unk()))
    if num_unknown * 100 >= MANY_UNKNOWN_PERCENT * num_tokens:
        warn_of_unknown_words(f"{path}.bin", num_unknown / num_tokens)


def _chunks(dataset: MMapIndexedDataset) -> Iterator[np.ndarray]:
    """Yield all tokens of a data set, a few million at a time."""
    num_tokens = int(dataset.sizes.sum(dtype=np.int64))
    all_tokens = np.frombuffer(dataset._bin_buffer, dataset._index.dtype, num_tokens)
    for start in range(0, num_tokens, CHECKED_AT_ONCE):
        yield all_tokens[start : start + CHECKED_AT_ONCE]
