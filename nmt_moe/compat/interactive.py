"""Let fairseq-interactive survive bad lines: each gets a message, all others their translation."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from nmt_moe.compat._replace import replace


def skip_bad_lines(namespace: dict[str, Any]) -> None:
    """Replace the two readers of lines in the namespace of `fairseq_cli.interactive.main`.

    Reason: a line that is not UTF-8, or longer than the model takes, ends the whole run. Other
    commands' namespaces lack the two names. Under `python -m` the module is called `__main__`.
    """
    if "buffered_read" not in namespace or "make_batches" not in namespace:
        return
    owner = sys.modules[namespace["__name__"]]
    replace(owner, "buffered_read", lambda _: buffered_read)
    replace(owner, "make_batches", _batching)


class NumberedLines(list):
    """Lines of the input in order, None where one could not be read.

    Attributes:
        first_number: Number of the first of them in the input, counted from 1.
    """

    def __init__(self, first_number: int) -> None:
        super().__init__()
        self.first_number = first_number


def buffered_read(input: str, buffer_size: int) -> Iterator[NumberedLines]:  # noqa: A002
    """Yield up to `buffer_size` lines at a time of the file `input`; '-' is standard input."""
    stream = nullcontext(sys.stdin.buffer) if input == "-" else open(input, "rb")  # noqa: SIM115
    with stream as raw_lines:
        lines = NumberedLines(1)
        for number, raw_line in enumerate(raw_lines, start=1):
            lines.append(_decode(raw_line, number))
            if len(lines) >= buffer_size:
                yield lines
                lines = NumberedLines(number + 1)
        if lines:
            yield lines


def _decode(raw_line: bytes, number: int) -> str | None:
    try:
        return raw_line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw_line[error.start]:02x} at position {error.start + 1}"
        _report(number, f"is not valid UTF-8 ({found}): not translated")
        return None


def _batching(make: Callable) -> Callable:
    def make_batches(
        lines: list, cfg: Any, task: Any, max_positions: Any, encode_fn: Callable
    ) -> Iterator[Any]:
        first_number = getattr(lines, "first_number", 1)
        # Behind a tab stand the words that --constraints asks for.
        source_of = (lambda line: line.split("\t")[0]) if cfg.generation.constraints else str
        longest = longest_source(max_positions, cfg.dataset.max_tokens)
        kept = [
            place
            for place, line in enumerate(lines)
            if line is not None
            and fits(source_of(line), first_number + place, task, longest, encode_fn)
        ]
        if not kept:
            return
        kept_lines = [lines[place] for place in kept]
        for batch in make(kept_lines, cfg, task, max_positions, encode_fn):
            # An id is a line's place among all lines read, the bad ones counted.
            yield batch._replace(ids=torch.tensor([kept[i] for i in batch.ids.tolist()]))

    return make_batches


def longest_source(max_positions: Any, max_tokens: int | None) -> float:
    """Return how many tokens, end of sentence counted, a source sentence may have."""
    if isinstance(max_positions, dict):  # one limit for each language pair
        max_positions = min(max_positions.values())
    if isinstance(max_positions, tuple | list):
        max_positions = max_positions[0]
    limits = [limit for limit in (max_positions, max_tokens) if limit is not None]
    return min(limits, default=float("inf"))


def fits(line: str, number: int, task: Any, longest: float, encode_fn: Callable) -> bool:
    """Report what is odd about a line; return whether it can be translated at all."""
    if not line:
        _report(number, "is empty: what the model makes of it means nothing")
        return True
    tokens, lengths = task.get_interactive_tokens_and_lengths([line], encode_fn)
    length = int(lengths[0])
    if length > longest:
        _report(number, f"has {length} tokens, more than the {longest:.0f} allowed: not translated")
        return False
    dictionary = getattr(task, "source_dictionary", None)
    unknown = int((tokens[0] == dictionary.unk()).sum()) if dictionary is not None else 0
    if unknown:
        _report(number, f"has tokens that are not in the dictionary: {unknown} of {length}")
    return True


def _report(number: int, what: str) -> None:
    print(f"fairseq-interactive: line {number} {what}", file=sys.stderr, flush=True)  # noqa: T201
