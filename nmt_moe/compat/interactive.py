"""Let fairseq-interactive report each bad line, and translate all others."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from fairseq.tasks.translation import TranslationTask

from nmt_moe.compat._replace import replace, replace_in_command
from nmt_moe.compat.dictionaries import marks_of
from nmt_moe.text.lines import BadLine, scan_lines

# No sentence is this long; longer lines are not kept in memory.
MAX_LINE_BYTES = 1 << 20
PIECE_START = "\u2581"  # how sentencepiece marks the space before a piece


def skip_unreadable_lines() -> None:
    """Read lines as `nmt_moe.text.lines` does, and skip lines that cannot be used.

    Reason: a line that is not UTF-8 stops the whole run.
    """
    replace_in_command("interactive", "buffered_read", _reading)
    replace_in_command("interactive", "make_batches", _skipping_unread)


def _reading(_: Callable) -> Callable:
    return buffered_read


class NumberedLines(list):
    """Lines of the input in order; None for each line that could not be read.

    Attributes:
        first_number: Number of the first of these lines in the input, counted from 1.
    """

    def __init__(self, first_number: int) -> None:
        super().__init__()
        self.first_number = first_number

    def numbered(self) -> Iterator[tuple[int, str]]:
        """Yield the index and text of each readable line."""
        return ((index, line) for index, line in enumerate(self) if line is not None)

    def report(self, index: int, what: str) -> None:
        """Print a message about a line, by its index."""
        report(self.first_number + index, what)


def report(number: int, what: str) -> None:
    """Print a message about a line of the input, counted from 1."""
    print(f"fairseq-interactive: line {number} {what}", file=sys.stderr, flush=True)  # noqa: T201


def buffered_read(input: str, buffer_size: int) -> Iterator[NumberedLines]:  # noqa: A002
    """Yield the lines of the file `input` ('-': standard input), up to `buffer_size` at a time."""
    is_stdin = input == "-"
    name = "standard input" if is_stdin else input
    with nullcontext(sys.stdin.buffer) if is_stdin else open(input, "rb") as stream:
        lines = NumberedLines(1)
        found = scan_lines(stream, name, max_bytes=MAX_LINE_BYTES)
        for number, line in enumerate(found, start=1):
            if isinstance(line, BadLine):
                report(number, f"{line.reason}: not translated")
                lines.append(None)
            else:
                lines.append(line.strip())
            if len(lines) >= buffer_size:
                yield lines
                lines = NumberedLines(number + 1)
        if lines:
            yield lines


def _skipping_unread(make: Callable) -> Callable:
    def make_batches(lines: NumberedLines, *args: Any) -> Iterator[Any]:
        kept = [index for index, _ in lines.numbered()]
        if kept:
            for batch in make([lines[index] for index in kept], *args):
                # An id is a line's index among all lines read, including bad lines.
                yield batch._replace(ids=torch.tensor([kept[i] for i in batch.ids.tolist()]))

    return make_batches


def skip_lines_that_are_too_long() -> None:
    """Skip each line that is too long for the model.

    Reason: such a line stops the whole run.
    """
    replace_in_command("interactive", "make_batches", _skipping_long)


def _skipping_long(make: Callable) -> Callable:
    def make_batches(
        lines: NumberedLines, cfg: Any, task: Any, max_positions: Any, encode_fn: Callable
    ) -> Iterator[Any]:
        longest = longest_source(max_positions, cfg.dataset.max_tokens)
        for index, line in lines.numbered():
            length = len(encode(source_of(line, cfg), task, encode_fn))
            if length > longest:
                allowed = f"more than the {longest:.0f} allowed"
                lines.report(index, f"has {length} tokens, {allowed}: not translated")
                lines[index] = None
        yield from make(lines, cfg, task, max_positions, encode_fn)

    return make_batches


def longest_source(max_positions: Any, max_tokens: int | None) -> float:
    """Return how many tokens a source sentence may have, including the end mark."""
    if isinstance(max_positions, dict):  # one limit for each language pair
        max_positions = min(max_positions.values())
    if isinstance(max_positions, tuple | list):
        max_positions = max_positions[0]
    limits = [limit for limit in (max_positions, max_tokens) if limit is not None]
    return min(limits, default=float("inf"))


def source_of(line: str, cfg: Any) -> str:
    """Return a line without the constraints after its tabs."""
    return line.split("\t")[0] if cfg.generation.constraints else line


def encode(line: str, task: Any, encode_fn: Callable) -> torch.Tensor:
    """Return the tokens of a source line, including special symbols."""
    tokens, _ = task.get_interactive_tokens_and_lengths([line], encode_fn)
    return tokens[0]


def skip_constraints_with_unknown_words() -> None:
    """Skip each constraint that contains words unknown to the model.

    Reason: the symbol for unknown words would be forced into the translation.
    """
    replace_in_command("interactive", "make_batches", _skipping_constraints)


def _skipping_constraints(make: Callable) -> Callable:
    def make_batches(
        lines: NumberedLines, cfg: Any, task: Any, max_positions: Any, encode_fn: Callable
    ) -> Iterator[Any]:
        for index, line in lines.numbered() if cfg.generation.constraints else []:
            source, *constraints = line.split("\t")
            kept = []
            for constraint in constraints:
                reason = _find_unknown(encode_fn(constraint), task.target_dictionary)
                if reason is None:
                    kept.append(constraint)
                else:
                    lines.report(index, f"has the constraint '{constraint}' {reason}: ignored")
            lines[index] = "\t".join([source, *kept])
        yield from make(lines, cfg, task, max_positions, encode_fn)

    return make_batches


def _find_unknown(constraint: str, dictionary: Any) -> str | None:
    """Return why encoded words cannot be a constraint; None if they can."""
    words = constraint.split()
    if not words:
        return "without words"
    known = set(dictionary.indices) - marks_of(dictionary) - {dictionary.unk_word}
    unknown = [word for word in words if word not in known]
    return f"with unknown words ({' '.join(unknown)})" if unknown else None


def report_odd_lines() -> None:
    """Report lines without words, with unknown words, or with pieces that are split again.

    Reason: their translations mean little, but look like all others.
    """
    replace_in_command("interactive", "make_batches", _reporting)


def _reporting(make: Callable) -> Callable:
    def make_batches(
        lines: NumberedLines, cfg: Any, task: Any, max_positions: Any, encode_fn: Callable
    ) -> Iterator[Any]:
        cuts_pieces = getattr(cfg.bpe, "_name", None) == "sentencepiece"
        for index, line in lines.numbered():
            source = source_of(line, cfg)
            if not source:
                lines.report(index, "is empty, and so is its translation")
                continue
            if cuts_pieces and PIECE_START in source:
                lines.report(index, "already has sentence pieces, which --bpe splits a second time")
            dictionary, tokens = task.source_dictionary, encode(source, task, encode_fn)
            marks = {dictionary.index(mark) for mark in marks_of(dictionary)}
            words = [token for token in tokens.tolist() if token not in marks]
            unknown = words.count(dictionary.unk())
            if unknown == len(words):
                fault = "contains no words from the dictionary, so its translation is meaningless"
                lines.report(index, fault)
            elif unknown:
                share = f"{unknown} of {len(tokens)}"
                lines.report(index, f"has tokens that are not in the dictionary: {share}")
        yield from make(lines, cfg, task, max_positions, encode_fn)

    return make_batches


def forget_translated_lines() -> None:
    """Keep memory use independent of the number of translated lines.

    Reason: fairseq's task keeps an iterator for each buffer of lines.
    """
    replace_in_command("interactive", "make_batches", _forgetting)


def _forgetting(make: Callable) -> Callable:
    def make_batches(lines: Any, cfg: Any, task: Any, *args: Any) -> Iterator[Any]:
        yield from make(lines, cfg, task, *args)
        task.dataset_to_epoch_iter.clear()

    return make_batches


def translate_blank_into_blank() -> None:
    """Return an empty translation for a source without words.

    Reason: models invent fluent sentences for it. Forced prefixes and constraints are kept.
    """
    replace(TranslationTask, "inference_step", _translating)


def _translating(translate: Callable) -> Callable:
    def inference_step(
        task: Any,
        generator: Any,
        models: Any,
        sample: dict[str, Any],
        prefix_tokens: Any = None,
        constraints: Any = None,
    ) -> Any:
        found = translate(task, generator, models, sample, prefix_tokens, constraints)
        if prefix_tokens is not None:
            return found
        dictionary, tokens = task.source_dictionary, sample["net_input"]["src_tokens"]
        marks = [dictionary.index(mark) for mark in marks_of(dictionary)]
        is_blank = torch.isin(tokens, tokens.new_tensor(marks)).all(1)
        if constraints is not None:  # (B, ...); the first column is their number
            is_blank &= constraints[:, 0] == 0
        return [
            [make_blank(hypotheses[0], task.target_dictionary.eos())] if blank else hypotheses
            for blank, hypotheses in zip(is_blank.tolist(), found, strict=True)
        ]

    return inference_step


def make_blank(hypothesis: dict[str, Any], eos: int) -> dict[str, Any]:
    """Return a copy of a hypothesis that contains only the end mark."""
    scores, attention = hypothesis["positional_scores"], hypothesis.get("attention")
    alignment = hypothesis.get("alignment")
    return {
        **hypothesis,
        "tokens": hypothesis["tokens"].new_tensor([eos]),
        "score": scores.new_zeros(()),
        "positional_scores": scores.new_zeros(1),
        "attention": None if attention is None else attention[..., :1],
        "alignment": None if alignment is None else alignment[:0],
    }
