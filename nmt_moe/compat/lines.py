"""Read text as `nmt_moe.text.lines` does, wherever fairseq reads it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from fairseq import binarizer, file_chunker_utils, utils
from fairseq.data import dictionary
from fairseq.data.indexed_dataset import IndexedRawTextDataset

from nmt_moe.compat._replace import replace
from nmt_moe.text.lines import chunk_offsets, count_lines, read_lines


def read_lines_of_texts_by_one_rule() -> None:
    """Let fairseq-preprocess count lines as `wc -l` does, and report lines that it cannot use.

    Reason: fairseq ends a line at a carriage return, which shifts all later pairs. It also makes a
    byte order mark part of a word, and reports invalid UTF-8 as "negative seek position".
    """
    for module in (binarizer, dictionary, file_chunker_utils):
        replace(module, "find_offsets", lambda _: find_offsets)
        module.Chunker = read_chunk


def find_offsets(filename: str, num_chunks: int) -> list[int]:
    """Check all lines of a file; return the offsets of its chunks, and its size.

    Raises:
        ValueError: if a line is rejected. The message names the file, line and reason.
    """
    count_lines_once(filename)
    return chunk_offsets(filename, num_chunks)


@contextmanager
def read_chunk(path: str, start_offset: int, end_offset: int) -> Iterator[Iterator[str]]:
    """Yield an iterator over the lines between two offsets; an end of 0 means the file's end."""
    yield read_lines(path, start_offset, end_offset if end_offset > 0 else None)


def count_lines_once(path: str) -> int:
    """Return the number of lines in a file. A file that has not changed is read only once.

    Raises:
        ValueError: as in `nmt_moe.text.lines.read_lines`.
    """
    status = os.stat(path)
    return _count_lines(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _count_lines(path: str, size: int, mtime_ns: int) -> int:
    return count_lines(path)


def read_lines_of_raw_data_by_one_rule() -> None:
    """Let `--dataset-impl raw` find the same sentences as fairseq-preprocess.

    Reason: the text is copied unchanged and read again, with carriage returns as line breaks.
    """
    replace(IndexedRawTextDataset, "read_data", lambda _: read_raw_data)


def read_raw_data(
    dataset: IndexedRawTextDataset, path: str, dictionary: dictionary.Dictionary
) -> None:
    """Fill a raw data set from its text."""
    for line in read_lines(path):
        dataset.lines.append(line)
        tokens = dictionary.encode_line(
            line,
            add_if_not_exist=False,
            append_eos=dataset.append_eos,
            reverse_order=dataset.reverse_order,
        )
        dataset.tokens_list.append(tokens.long())
    dataset.sizes = np.array([len(tokens) for tokens in dataset.tokens_list])


def name_damaged_alignment_dictionaries() -> None:
    """Report a line of the `--replace-unk` file that is not a word and its translation.

    Reason: such a line causes an IndexError, and fairseq reads the file in the machine's default
    encoding.
    """
    replace(utils, "load_align_dict", lambda _: load_align_dict)


def load_align_dict(replace_unk: str | None) -> dict[str, str] | None:
    """Return replacements for unknown words: None replaces none, and {} copies the source words.

    Raises:
        ValueError: if a line does not consist of two words. The message names it.
    """
    if not replace_unk:
        return None if replace_unk is None else {}
    translations = {}
    for number, line in enumerate(read_lines(replace_unk), start=1):
        words = line.split()
        if len(words) != 2:
            raise ValueError(
                f"`{replace_unk}`, line {number} must be two words, a word and its "
                f"translation, but the number of words is {len(words)}."
            )
        translations[words[0]] = words[1]
    return translations
