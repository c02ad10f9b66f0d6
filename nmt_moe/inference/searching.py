"""Run the beam search on batches of sentences, with one network or an ensemble."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from nmt_moe.inference.layers import Trace
from nmt_moe.inference.networks import DecoderState, TranslationNetwork
from nmt_moe.search import BeamConfig, Hypothesis, Restrictions, beam_search
from nmt_moe.text.vocabulary import EOS, PAD, UNK

ResultT = TypeVar("ResultT")
# Factor by which equal batches are made larger, so that no small batch is left over.
SLACK = 1.03


@dataclass(frozen=True)
class Limits:
    """The maximum number of pieces in a translation: a S + b for S source tokens."""

    a: float
    b: int

    def of(self, source: Sequence[int]) -> int:
        """Return the maximum length without the end mark, for a source with its end mark."""
        return int(self.a * len(source) + self.b)


@dataclass(frozen=True)
class EnsembleState:
    """The states of several networks."""

    states: list[DecoderState]

    def reorder(self, rows: Tensor) -> Self:
        """Return the state of new rows; `rows`, (R',) int64, contains the old row of each."""
        return type(self)([state.reorder(rows) for state in self.states])


class Ensemble:
    """A single network, or several networks whose probabilities are averaged."""

    def __init__(self, networks: Sequence[TranslationNetwork]) -> None:
        self.networks = list(networks)

    def start(self, sentences: list[list[int]], trace: Trace | None = None) -> EnsembleState:
        """Encode sentences; `trace` receives the experts of the first network."""
        traces = [trace, *[None] * (len(self.networks) - 1)]
        pairs = zip(self.networks, traces, strict=True)
        return EnsembleState([one.start(one.encode(sentences, PAD, own)) for one, own in pairs])

    def step(
        self, tokens: Tensor, state: EnsembleState, trace: Trace | None = None
    ) -> tuple[Tensor, Tensor, EnsembleState]:
        """Predict the next token; this is the `step` of `beam_search`."""
        traces = [trace, *[None] * (len(self.networks) - 1)]
        rows = zip(self.networks, state.states, traces, strict=True)
        results = [one.step(tokens, own, of_network) for one, own, of_network in rows]
        log_probs, attention, states = zip(*results, strict=True)
        if len(results) == 1:
            return log_probs[0], attention[0], EnsembleState(list(states))
        mean = torch.stack(log_probs).logsumexp(dim=0) - math.log(len(results))
        return mean, torch.stack(attention).mean(dim=0), EnsembleState(list(states))


def make_batches(sentences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of sentence indices, grouped by similar length, longest first.

    Args:
        sentences: The sentences to translate.
        batch_tokens: Maximum number of tokens in a batch, including padding; a longer sentence
            forms its own batch.
    """
    order = sorted(range(len(sentences)), key=lambda number: -len(sentences[number]))
    batch: list[int] = []
    for number in order:
        longest = len(sentences[batch[0]]) if batch else 0
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def share_batches(
    sentences: Sequence[Sequence[int]], batch_tokens: int, num_threads: int
) -> list[list[int]]:
    """Return the batches of `make_batches`, made smaller if threads would get unequal shares."""
    batches = list(make_batches(sentences, batch_tokens))
    if num_threads == 1 or len(batches) < 2:
        return batches
    size = sum(len(batch) * len(sentences[batch[0]]) for batch in batches)
    number = num_threads * math.ceil(size / (num_threads * batch_tokens))
    return list(make_batches(sentences, min(batch_tokens, math.ceil(SLACK * size / number))))


def run_batches(
    run: Callable[[list[int]], ResultT], batches: Sequence[list[int]]
) -> Iterator[ResultT]:
    """Run a function over batches in parallel, with one of torch's threads for each batch.

    A second thread would hardly speed up small products, so it runs a second batch instead. A
    single batch gets all threads.

    Yields:
        The results of `run`, in the order of the batches.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(batches) < 2:
        yield from map(run, batches)
        return

    def run_alone(batch: list[int]) -> ResultT:
        with torch.inference_mode():
            return run(batch)

    workers = min(num_threads, len(batches))
    try:
        with ThreadPoolExecutor(workers, "batch", torch.set_num_threads, (1,)) as pool:
            yield from pool.map(run_alone, batches)
    finally:
        torch.set_num_threads(num_threads)  # part of this setting applies to the whole process


def search(
    ensemble: Ensemble,
    sentences: list[list[int]],
    config: BeamConfig,
    limits: Limits,
    num_words: Sequence[int],
) -> list[list[Hypothesis]]:
    """Search for the translations of one batch of sentences.

    Args:
        ensemble: The networks.
        sentences: Token ids of the sources, with their language tokens and end marks.
        config: Configuration of the search.
        limits: Limits on the hypotheses' lengths.
        num_words: Number of positions of each source that count for coverage, which are all except
            the end mark.
    """
    state = ensemble.start(sentences)
    start = torch.full((len(sentences),), EOS)
    restrictions = Restrictions(
        eos=EOS,
        pad=PAD,
        max_lengths=torch.tensor([limits.of(sentence) for sentence in sentences]),
        unk=UNK,
    )
    words = None
    if config.search.coverage_penalty_beta:
        width = max(map(len, sentences))
        words = torch.arange(width) < torch.tensor(num_words).unsqueeze(1)
    return beam_search(ensemble.step, state, start, config, restrictions, words)
