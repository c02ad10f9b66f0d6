"""Run networks on supplied translations (teacher forcing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.inference.layers import Trace
from nmt_moe.inference.results import Routing
from nmt_moe.inference.searching import Ensemble, make_batches
from nmt_moe.text.vocabulary import EOS, PAD


@dataclass(frozen=True)
class Forced:
    """The networks' results for a sentence with a given target of T tokens.

    Attributes:
        log_probs: T + 1 log-probabilities in nats, one for each token and one for the end mark.
        attention: (T + 1, S) float32, weights of the source tokens for each target token.
        source, target: Routing of the S source tokens and of the T + 1 target tokens in the first
            network; None if it has no MoE layers.
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
    """Run networks on supplied translations (teacher forcing).

    Args:
        ensemble: The networks.
        sentences: Sources with their end marks.
        targets: A translation of each source, without its end mark.
        with_inputs: Whether to keep the inputs to the MoE layers.

    Returns:
        A result for each sentence. The experts of a target token are the ones that predicted it,
            because the layer sent them the vector of the previous token.
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


def force_in_batches(
    ensemble: Ensemble,
    sentences: Sequence[list[int]],
    targets: Sequence[list[int]],
    batch_tokens: int,
    with_inputs: bool = False,
) -> list[Forced]:
    """Run `force_decode` in batches, and return the results in the order of the sentences.

    `batch_tokens` is the maximum number of tokens in a batch on either side, including padding.
    """
    lengths = [max(len(s), len(t) + 1) for s, t in zip(sentences, targets, strict=True)]
    results: dict[int, Forced] = {}
    for batch in make_batches(list(map(range, lengths)), batch_tokens):
        own = [sentences[number] for number in batch], [targets[number] for number in batch]
        results.update(zip(batch, force_decode(ensemble, *own, with_inputs), strict=True))
    return [results[number] for number in range(len(lengths))]


def _split_routing(trace: Trace, lengths: list[int]) -> list[Routing] | None:
    """Return each sentence's routing from a call that read all sentences' tokens in sequence."""
    if not trace.expert_ids:
        return None
    inputs = trace.inputs[0].split(lengths) if trace.inputs else [None] * len(lengths)
    parts = trace.expert_ids[0].split(lengths), trace.gates[0].split(lengths), inputs
    return [Routing(*part) for part in zip(*parts, strict=True)]


def _stack_routing(trace: Trace, num_rows: int) -> list[Routing] | None:
    """Return each row's routing from several calls that made one step each for all rows."""
    if not trace.expert_ids:
        return None
    inputs = torch.stack(trace.inputs, dim=1) if trace.inputs else [None] * num_rows
    parts = torch.stack(trace.expert_ids, dim=1), torch.stack(trace.gates, dim=1), inputs
    return [Routing(*part) for part in zip(*parts, strict=True)]
