"""Sentences of pieces to hypotheses: batches, beam search, ensembles, experts of each piece."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from nmt_moe.inference.layers import Trace
from nmt_moe.inference.networks import DecoderState, TranslationNetwork
from nmt_moe.inference.results import Routing
from nmt_moe.search import BeamConfig, Hypothesis, Restrictions, beam_search
from nmt_moe.text.vocabulary import EOS, PAD, UNK


@dataclass(frozen=True)
class Limits:
    """How long a translation may be: a S + b pieces for S source pieces, the end mark counted."""

    a: float
    b: int

    def of(self, source: Sequence[int]) -> int:
        """Return the most pieces without the end mark, for a source with its end mark."""
        return int(self.a * len(source) + self.b)


@dataclass(frozen=True)
class EnsembleState:
    """The states of several networks."""

    states: list[DecoderState]

    def reorder(self, rows: Tensor) -> Self:
        """Return the state of new rows; `rows` (R',) int64 holds the old row of each."""
        return replace(self, states=[state.reorder(rows) for state in self.states])


class Ensemble:
    """Networks whose probabilities are averaged; one of them is itself."""

    def __init__(self, networks: Sequence[TranslationNetwork]) -> None:
        self.networks = list(networks)

    def start(self, sentences: list[list[int]], trace: Trace | None = None) -> EnsembleState:
        """Encode sentences; `trace` gets the experts of the first network."""
        traces = [trace, *[None] * (len(self.networks) - 1)]
        pairs = zip(self.networks, traces, strict=True)
        return EnsembleState([one.start(one.encode(sentences, PAD, own)) for one, own in pairs])

    def step(
        self, tokens: Tensor, state: EnsembleState, trace: Trace | None = None
    ) -> tuple[Tensor, Tensor, EnsembleState]:
        """Predict the next token: the `step` of `beam_search`."""
        traces = [trace, *[None] * (len(self.networks) - 1)]
        rows = zip(self.networks, state.states, traces, strict=True)
        results = [one.step(tokens, own, of_network) for one, own, of_network in rows]
        log_probs, attention, states = zip(*results, strict=True)
        if len(results) == 1:
            return log_probs[0], attention[0], EnsembleState(list(states))
        mean = torch.stack(log_probs).logsumexp(dim=0) - math.log(len(results))
        return mean, torch.stack(attention).mean(dim=0), EnsembleState(list(states))


def make_batches(sentences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of sentences of about the same length, the longest first.

    Args:
        sentences: To be put into batches.
        batch_tokens: Of a batch at most, padding included; a longer sentence is a batch of its own.
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


def search(
    ensemble: Ensemble,
    sentences: list[list[int]],
    config: BeamConfig,
    limits: Limits,
    num_words: Sequence[int],
) -> list[list[Hypothesis]]:
    """Translate a batch.

    Args:
        ensemble: Of networks.
        sentences: Numbers of the source, with language mark and end mark.
        config: Of the search.
        limits: Of the hypotheses' lengths.
        num_words: Of each source, positions that coverage counts: all but the end mark.
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


@dataclass(frozen=True)
class Forced:
    """What the networks make of a sentence whose target of T tokens is given.

    Attributes:
        log_probs: T + 1, of each token and of the end mark, nats.
        attention: (T + 1, S) float32.
        source, target: The routing of the S source tokens, and of the T + 1 tokens written, in the
            first network; None if it has no MoE layers.
    """

    log_probs: list[float]
    attention: Tensor
    source: Routing | None
    target: Routing | None


def force_decode(
    ensemble: Ensemble,
    sentences: list[list[int]],
    targets: list[list[int]],
    with_inputs: bool = False,
) -> list[Forced]:
    """Let networks read given translations: teacher forcing.

    Args:
        ensemble: Of networks.
        sentences: Sources with their end marks.
        targets: A translation of each, without end mark.
        with_inputs: Keep what the MoE layers read.

    Returns:
        For each sentence. The experts of a target token are those that wrote it: its predecessor's
        vector went through them.
    """
    of_source, of_target = (Trace([], [], [] if with_inputs else None) for _ in range(2))
    state = ensemble.start(sentences, of_source)
    longest = max(map(len, targets)) + 1
    rows = [[EOS, *t, EOS] + [PAD] * (longest - len(t) - 1) for t in targets]
    tokens = torch.tensor(rows)
    log_probs, attention = [], []
    for step in range(longest):
        found, weights, state = ensemble.step(tokens[:, : step + 1], state, of_target)
        log_probs.append(found.gather(1, tokens[:, step + 1 : step + 2]).squeeze(1))
        attention.append(weights)
    chosen, weights = torch.stack(log_probs, dim=1).tolist(), torch.stack(attention, dim=1)
    sources = _split_routing(of_source, list(map(len, sentences)))
    written = _stack_routing(of_target, len(targets))
    results = []
    for row, (sentence, target) in enumerate(zip(sentences, targets, strict=True)):
        end = len(target) + 1
        source = None if sources is None else sources[row]
        routing = None if written is None else written[row][:end]
        own = weights[row, :end, : len(sentence)]
        results.append(Forced(chosen[row][:end], own, source, routing))
    return results


def _split_routing(trace: Trace, lengths: list[int]) -> list[Routing] | None:
    """Return the routing of each sentence of a call that took all, one after the other."""
    if not trace.expert_ids:
        return None
    inputs = trace.inputs[0].split(lengths) if trace.inputs else [None] * len(lengths)
    parts = trace.expert_ids[0].split(lengths), trace.gates[0].split(lengths), inputs
    return [Routing(*part) for part in zip(*parts, strict=True)]


def _stack_routing(trace: Trace, num_rows: int) -> list[Routing] | None:
    """Return the routing of each row of calls that each took a step of all."""
    if not trace.expert_ids:
        return None
    inputs = torch.stack(trace.inputs, dim=1) if trace.inputs else [None] * num_rows
    parts = torch.stack(trace.expert_ids, dim=1), torch.stack(trace.gates, dim=1), inputs
    return [Routing(*part) for part in zip(*parts, strict=True)]
