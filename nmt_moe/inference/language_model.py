"""Score text with a language model, and sample text from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch

from nmt_moe.checks import check_range, check_whole
from nmt_moe.inference.bundle import SearchDefaults
from nmt_moe.inference.layers import MoE, Trace
from nmt_moe.inference.networks import LanguageNetwork
from nmt_moe.inference.opening import Bundle, open_bundle
from nmt_moe.inference.results import LineScore, Routing, score_line
from nmt_moe.inference.searching import make_batches
from nmt_moe.inference.text import SourceText, TargetText, find_fault
from nmt_moe.text.vocabulary import BOS, EOS, PAD, UNK

BATCH_TOKENS = 4096


class LanguageModel:
    """A language model that scores and samples lines of text, opened by `LanguageModel.load`.

    Every line starts from a zero state, as in training with `--sample-break-mode eos`.

    Attributes:
        defaults: Search defaults of the bundle.
        config: Configuration of the bundle.
        vocabularies: The vocabulary, under the name "target".
    """

    def __init__(self, bundle: Bundle) -> None:
        assert isinstance(bundle.network, LanguageNetwork)
        self._network = bundle.network
        self.config, self.vocabularies = bundle.config, bundle.vocabularies
        self._vocabulary = bundle.vocabularies["target"]
        processor = bundle.processors["target"]
        language = bundle.config.languages[0] if bundle.config.languages else None
        self._source_text = SourceText(bundle.config.text, processor, language)
        self._target_text = TargetText(processor)
        self.defaults: SearchDefaults = bundle.config.search

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Open a bundle.

        Raises:
            ValueError: if a file is missing, changed or of a newer format; the message names it.
        """
        return cls(open_bundle(folder, "language_model"))

    @torch.inference_mode()
    def score(
        self,
        lines: str | Sequence[str],
        *,
        batch_tokens: int = BATCH_TOKENS,
        with_experts: bool = False,
        with_inputs: bool = False,
    ) -> list[LineScore]:
        """Compute the log-probability of each line.

        Args:
            lines: Any number of lines, without line endings; a string means a list of one. A line
                without words is scored as an empty line.
            batch_tokens: Maximum number of pieces in a batch, including padding.
            with_experts: Whether to also return the experts of each piece.
            with_inputs: Whether to also return the inputs to the MoE layer.

        Raises:
            ValueError: if a line contains a line feed, a control character or half a surrogate
                pair; the message names the line.
        """
        if isinstance(lines, bytes) or not isinstance(lines, Iterable):
            raise ValueError(f"`lines` must be a list of strings, but is {type(lines).__name__}.")
        lines = [lines] if isinstance(lines, str) else list(lines)
        for number, line in enumerate(lines, start=1):
            _check_line(f"line {number}", line)
        check_whole("batch_tokens", batch_tokens, 1)
        pieces = [self._source_text.pieces(line) for line in lines]
        numbers = [self._vocabulary.numbers(own) for own in pieces]
        results: dict[int, LineScore] = {}
        for batch in make_batches([[EOS, *own] for own in numbers], batch_tokens):
            trace = Trace([], [], [] if with_inputs else None)
            rows = self._score([numbers[number] for number in batch], trace)
            lengths = [len(numbers[number]) + 1 for number in batch]
            routings = _split_steps(trace, lengths) if with_experts else [None] * len(batch)
            for number, row, routing in zip(batch, rows, routings, strict=True):
                score = score_line(lines[number], pieces[number], numbers[number], row)
                results[number] = replace(score, routing=routing)
        return [results[number] for number in range(len(lines))]

    @property
    def moe_layers(self) -> dict[str, MoE]:
        """Return the MoE layer under the name "decoder", or {} for a dense model."""
        layer = self._network.moe
        return {"decoder": layer} if isinstance(layer, MoE) else {}

    def _score(self, sentences: list[list[int]], trace: Trace | None = None) -> list[list[float]]:
        lengths = [len(sentence) + 1 for sentence in sentences]
        steps = lengths[0]
        read = [[EOS, *s] + [PAD] * (steps - len(s) - 1) for s in sentences]
        outputs = self._network.num_outputs
        known = [[word if word < outputs else UNK for word in s] for s in sentences]
        follow = [[*s, EOS] + [PAD] * (steps - len(s) - 1) for s in known]
        log_probs = self._network.score(
            torch.tensor(read).t(), lengths, torch.tensor(follow).t(), trace
        )
        rows = log_probs.t().tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    @torch.inference_mode()
    def sample(
        self,
        num_samples: int = 1,
        prefix: str = "",
        *,
        temperature: float = 1.0,
        max_pieces: int = 200,
        seed: int = 1,
    ) -> list[str]:
        """Sample lines from the model.

        Args:
            num_samples: Number of lines.
            prefix: Text at the start of each line.
            temperature: Divisor of the logits; lower values make likely pieces more frequent.
            max_pieces: Maximum number of pieces in a line; longer lines are cut off.
            seed: Seed of the random numbers; the same seed gives the same lines.

        Raises:
            ValueError: if an option is out of range; the message names it.
        """
        check_whole("num_samples", num_samples, 1, 100_000)
        check_whole("max_pieces", max_pieces, 1, 100_000)
        check_range("temperature", temperature, 1e-3, 1e3)
        check_whole("seed", seed, 0, 2**63 - 1)
        _check_line("`prefix`", prefix)
        generator = torch.Generator().manual_seed(seed)
        begun = self._source_text.pieces(prefix)
        given = [EOS, *self._vocabulary.numbers(begun)]
        states = self._network.start(num_samples)
        for token in given:
            tokens = torch.full((num_samples,), token)
            log_probs, states = self._network.step(tokens, states)
        drawn = []
        is_open = torch.ones(num_samples, dtype=torch.bool)
        for _ in range(max_pieces):
            log_probs[:, [BOS, PAD, UNK]] = -torch.inf
            probs = (log_probs / temperature).softmax(dim=1)
            tokens = probs.multinomial(1, generator=generator).squeeze(1)
            drawn.append(tokens.masked_fill(~is_open, EOS))
            is_open &= tokens != EOS
            if not is_open.any():
                break
            log_probs, states = self._network.step(tokens, states)
        rows = torch.stack(drawn, dim=1).tolist()
        return [self._target_text.join([*begun, *self._words(row)]) for row in rows]

    def _words(self, row: list[int]) -> list[str]:
        length = row.index(EOS) if EOS in row else len(row)
        return [self._vocabulary.symbols[token] for token in row[:length]]


def _split_steps(trace: Trace, lengths: list[int]) -> Sequence[Routing | None]:
    """Return each row's routing from a call that processed all rows step by step.

    `lengths` contains the lengths of the rows, in descending order.
    """
    if not trace.expert_ids:
        return [None] * len(lengths)
    is_token = torch.arange(lengths[0]).unsqueeze(1) < torch.tensor(lengths)
    numbers = torch.zeros(is_token.shape, dtype=torch.int64)
    numbers[is_token] = torch.arange(int(is_token.sum()))
    inputs = trace.inputs[0] if trace.inputs else None
    whole = Routing(trace.expert_ids[0], trace.gates[0], inputs)
    return [whole[numbers[:length, row]] for row, length in enumerate(lengths)]


def _check_line(name: str, line: str) -> None:
    """Reject anything other than one line of text."""
    if not isinstance(line, str):
        raise ValueError(f"{name} must be a string, but is {type(line).__name__}.")
    fault = "contains a line feed" if "\n" in line else find_fault(line)
    if fault is not None:
        raise ValueError(f"{name} {fault}. Remove it.")
