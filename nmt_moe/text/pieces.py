"""Learn a vocabulary of pieces and its fairseq dictionary, and split text into pieces."""

from __future__ import annotations

import itertools
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece

from nmt_moe.text.digests import check_digests, write_digests
from nmt_moe.text.lines import read_lines
from nmt_moe.text.outputs import check_outputs, replacing

NORMALIZATIONS = ("nmt_nfkc", "nfkc", "nfc", "identity")
# sentencepiece ignores longer lines, and lines that contain the character it reserves.
MAX_SENTENCE_BYTES = 4192
RESERVED = "\u2585"
# fairseq splits text at each of these, so no piece may contain one.
WHITE_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class Training:
    """The result of learning a vocabulary.

    Attributes:
        num_pieces: Number of entries in the dictionary.
        left_out: Number of lines left out, for each reason.
    """

    num_pieces: int
    left_out: Counter[str]


def train(
    inputs: Sequence[Path],
    model: Path,
    dictionary: Path,
    vocab_size: int,
    *,
    model_type: str = "unigram",
    hard_vocab_limit: bool = True,
    character_coverage: float = 1.0,
    normalization: str = "nmt_nfkc",
    max_sentence_bytes: int = MAX_SENTENCE_BYTES,
) -> Training:
    """Learn a sentencepiece model, and write it with its digest and a dictionary of its pieces.

    Args:
        inputs: Texts with one sentence per line.
        model: Model file to write.
        dictionary: Dictionary file to write, in fairseq's format.
        vocab_size: Number of pieces, including the three that fairseq adds itself.
        model_type: Kind of sentencepiece model, "unigram" or "bpe".
        hard_vocab_limit: Whether to raise an error, instead of learning fewer pieces, if the text
            is too small for `vocab_size` pieces.
        character_coverage: Share of the text's characters that must be pieces; rarer characters
            become unknown.
        normalization: Normalisation of text before it is split, one of `NORMALIZATIONS`: NFKC with
            or without sentencepiece's treatment of spaces, only canonical composition, or only the
            replacement of white space by spaces.
        max_sentence_bytes: Maximum number of bytes in a line; longer lines are left out.

    Raises:
        ValueError: if a line cannot be read, the text is too small for so many pieces, a number is
            out of range, or an output is also an input or the other output.
        OSError: if a file cannot be opened.
    """
    left_out: Counter[str] = Counter()
    failure: list[ValueError] = []

    def sentences() -> Iterator[str]:
        try:
            for line in itertools.chain.from_iterable(map(read_lines, inputs)):
                if len(line.encode()) > max_sentence_bytes:
                    left_out[f"of more than {max_sentence_bytes} bytes"] += 1
                elif RESERVED in line:
                    left_out[f"with {RESERVED}, which sentencepiece reserves for itself"] += 1
                else:
                    yield with_plain_spaces(line)
        except ValueError as error:
            failure.append(error)
            raise

    _check_training(vocab_size, character_coverage, max_sentence_bytes)
    check_outputs(inputs, (model, dictionary))
    for path in inputs:
        path.open("rb").close()
    with replacing(model) as new_model, replacing(dictionary) as new_dictionary:
        with TemporaryDirectory() as folder, new_model.open("wb") as writer:
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=sentences(),
                    model_writer=writer,
                    vocab_size=vocab_size,
                    model_type=model_type,
                    character_coverage=character_coverage,
                    hard_vocab_limit=hard_vocab_limit,
                    max_sentence_length=max_sentence_bytes,
                    num_threads=1,
                    minloglevel=2,
                    **_normalization_flags(normalization, Path(folder)),
                )
            except RuntimeError as error:
                if failure:
                    raise failure[0] from None
                # sentencepiece's message begins with a source file and the condition that failed.
                reason = str(error).rpartition("] ")[2] or "they have too little text."
                raise ValueError(
                    f"cannot learn `--vocab-size` {vocab_size} pieces from "
                    f"{', '.join(map(str, inputs))}: {reason}"
                ) from None
        processor = load(new_model)
        special = {processor.unk_id(), processor.bos_id(), processor.eos_id()}
        pieces = [processor.id_to_piece(i) for i in range(len(processor)) if i not in special]
        # fairseq requires a count for each entry; it matters only if a dictionary is truncated.
        rows = "".join(f"{piece} 1\n" for piece in pieces)
        new_dictionary.write_text(rows, encoding="utf-8")
        digests_of(model).unlink(missing_ok=True)  # it may belong to an earlier model
    write_digests(digests_of(model), [model])
    return Training(len(pieces), left_out)


def _check_training(vocab_size: int, character_coverage: float, max_sentence_bytes: int) -> None:
    """Reject numbers that sentencepiece rejects without giving a reason."""
    for name, value, low, high in (
        ("--vocab-size", vocab_size, 4, 2**31 - 1),
        ("--character-coverage", character_coverage, 0.98, 1),
        ("--max-sentence-length", max_sentence_bytes, 1, 2**31 - 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be from {low} to {high}, but is {value}.")


def digests_of(model: Path) -> Path:
    """Return the path of a model's digest, which detects damage as small as one flipped bit."""
    return model.with_name(f"{model.name}.sha256")


def load(model: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a sentencepiece model.

    Raises:
        ValueError: if the file is not a complete model, or does not match the digest beside it.
        OSError: if it cannot be opened.
    """
    check_digests(digests_of(model), "`nmt-moe pieces train`", "Copy it again, or learn it again.")
    content = model.read_bytes()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
        return processor
    except RuntimeError:
        raise ValueError(
            f"`{model}` is not a complete sentencepiece model ({len(content)} bytes). Copy it "
            "again, or learn it again with `nmt-moe pieces train`."
        ) from None


def encode(
    lines: Iterable[str],
    processor: sentencepiece.SentencePieceProcessor,
    samples: int = 0,
    alpha: float = 0.2,
    seed: int = 1,
) -> Iterator[str]:
    """Yield all lines split into pieces, and then `samples` more copies of them, split at random.

    White space of any kind counts as a space. `alpha` sets how strongly splits with a higher
    probability are preferred; at 0, all splits are equally likely.

    Raises:
        ValueError: if `--samples` or `--alpha` is out of range; the message names the option.

    Source: Kudo 2018 (subword regularisation), section 3.
    """
    lines = map(with_plain_spaces, lines)
    if samples < 0:
        raise ValueError(f"`--samples` must be at least 0, but is {samples}.")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"`--alpha` must be a number of at least 0, but is {alpha}.")
    if samples:
        lines = list(lines)
    for line in lines:
        yield " ".join(processor.encode(line, out_type=str))
    sample = WordSampler(processor, alpha, seed)
    for _ in range(samples):
        for line in lines:
            yield sample(line)


def with_plain_spaces(line: str) -> str:
    """Return a line with each white-space character replaced by a space."""
    return WHITE_SPACE.sub(" ", line)


def decode(lines: Iterable[str], processor: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    """Yield the text of each line of pieces."""
    for line in lines:
        yield processor.decode_pieces(line.split(" "))


class WordSampler:
    """A sampler of word splits that prefers those with a higher probability in a unigram model.

    sentencepiece's own sampling is not reproducible, because its seed does not reach its generator.
    A unigram model splits each word independently, so sampling word by word gives the same
    distribution.
    """

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, alpha: float, seed: int
    ) -> None:
        self.processor = processor
        self.alpha = alpha
        self.generator = random.Random(seed)
        self.cuts: dict[str, tuple[list[str], list[float]]] = {}

    def __call__(self, line: str) -> str:
        """Draw a split for every word of a line."""
        # The joined pieces are the normalised line, with a marker before each word.
        words = re.findall("▁[^▁]*|^[^▁]+", "".join(self.processor.encode(line, out_type=str)))
        return " ".join(self.cut(word) for word in words)

    def cut(self, word: str) -> str:
        """Draw a split of a word."""
        if word not in self.cuts:
            self.cuts[word] = self.find_cuts(word)
        cuts, cumulative_weights = self.cuts[word]
        return self.generator.choices(cuts, cum_weights=cumulative_weights)[0]

    def find_cuts(self, word: str) -> tuple[list[str], list[float]]:
        """Return the likeliest splits of a word, with the cumulative sums of p ** alpha."""
        plain = word.removeprefix("▁")
        found = self.processor.nbest_encode(plain, nbest_size=64, out_type=str)
        scores = [self.alpha * self.log_probability(cut) for cut in found]
        weights = [math.exp(score - max(scores)) for score in scores]
        return [" ".join(cut) for cut in found], list(itertools.accumulate(weights))

    def log_probability(self, pieces: list[str]) -> float:
        """Sum the unigram scores in nats; a piece outside the vocabulary counts as 0."""
        return sum(self.processor.get_score(self.processor.piece_to_id(piece)) for piece in pieces)


def _normalization_flags(name: str, folder: Path) -> dict[str, Any]:
    """Return sentencepiece's flags. Canonical composition, which it lacks, is passed as a table."""
    if name != "nfc":
        return {"normalization_rule_name": name}
    rules = {
        source: unicodedata.normalize("NFC", source)
        for character in map(chr, range(0x110000))
        if (parts := unicodedata.normalize("NFD", character)) != character
        for source in (character, *_partly_composed(parts))
    }
    table = folder / "nfc.tsv"
    table.write_text(
        "".join(
            "\t".join(" ".join(f"{ord(c):X}" for c in side) for side in rule) + "\n"
            for rule in rules.items()
            if rule[0] != rule[1]
        )
    )
    return {"normalization_rule_tsv": str(table)}


def _partly_composed(parts: str) -> Iterator[str]:
    """Yield all ways to write a character as a composed base and combining marks in any order."""
    for marks in itertools.permutations(parts[1:]):
        spelled = parts[0] + "".join(marks)
        if unicodedata.normalize("NFD", spelled) == parts:
            for end in range(1, len(spelled) + 1):
                yield unicodedata.normalize("NFC", spelled[:end]) + spelled[end:]
