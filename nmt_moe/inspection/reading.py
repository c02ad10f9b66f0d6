"""Run a model over a text, and record how its experts are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from nmt_moe.inference import (
    LanguageModel,
    LineScore,
    PairScore,
    Routing,
    Translator,
    total_score,
)
from nmt_moe.inspection.usage import ExpertUsage

# Number of lines read together, enough to form batches of similar lengths.
CHUNK_LINES = 128


@dataclass(frozen=True)
class Reading:
    """A sentence that a model has read.

    Attributes:
        line: Index of the sentence in the text.
        source_tokens: The S tokens that the encoder read; empty for a language model.
        target: Score of the target, which is the reference, the model's own translation, or a
            language model's line.
        routings: Routing in "encoder", for each of `source_tokens`, and in "decoder", for each
            piece of the target and the end mark; only for layers that the model has.
    """

    line: int
    source_tokens: list[str]
    target: LineScore
    routings: dict[str, Routing]


@dataclass(frozen=True)
class TextUsage:
    """The use of a model's experts on a text.

    Attributes:
        layers: Usage in "encoder" and "decoder"; a side without an MoE layer is absent.
        score: Score of the references or of a language model's text. Without references, score of
            the model's own translations. None if all lines are blank.
        num_lines: Number of lines.
        num_blank: Number of lines skipped because they or their references are blank.
    """

    layers: dict[str, ExpertUsage]
    score: LineScore | None
    num_lines: int
    num_blank: int


def collect_usage(
    model: Translator | LanguageModel,
    texts: Sequence[str],
    references: Sequence[str] | None = None,
    target_lang: str | None = None,
    *,
    progress: bool = False,
    **search: Any,
) -> TextUsage:
    """Run a model over a text, and count how many times its experts are used.

    Args:
        model: The model that reads the text.
        texts: Lines. Blank lines are skipped.
        references: A translation of each line, for the decoder to read (teacher forcing); None to
            read the model's own translations.
        target_lang: Target language of a multilingual model.
        progress: Whether to show a progress bar on standard error.
        search: Options of `Translator.translate`, if there are no references.

    Raises:
        ValueError: as in `read_text`.
    """
    layers = {side: ExpertUsage(moe.config.num_experts) for side, moe in model.moe_layers.items()}
    scores, lines = [], set()
    for chunk in read_text(
        model, texts, references, target_lang, progress=progress, with_inputs=False, **search
    ):
        add_readings(layers, chunk)
        # Keeping the routing would fill the memory.
        scores += [replace(one.target, routing=None) for one in chunk]
        lines |= {one.line for one in chunk}
    total = total_score(scores) if scores else None
    return TextUsage(layers, total, len(texts), len(texts) - len(lines))


def add_readings(layers: dict[str, ExpertUsage], readings: Sequence[Reading]) -> None:
    """Add sentences to each layer's usage."""
    for side, usage in layers.items():
        routings = [one.routings[side] for one in readings]
        if routings:
            expert_ids = torch.cat([one.expert_ids for one in routings])
            usage.add(expert_ids, torch.cat([one.gates for one in routings]))


def read_text(
    model: Translator | LanguageModel,
    texts: Sequence[str],
    references: Sequence[str] | None = None,
    target_lang: str | None = None,
    *,
    progress: bool = False,
    with_inputs: bool = False,
    **search: Any,
) -> Iterator[list[Reading]]:
    """Yield the sentences of a text, several lines at a time.

    Lines that are blank or have a blank reference are skipped. The arguments are the same as in
    `collect_usage`; `with_inputs` keeps the inputs to the MoE layers.

    Raises:
        ValueError: if the numbers of texts and references differ, if a language model gets options
            for translation, or as in `Translator.translate`.
    """
    if references is not None and len(references) != len(texts):
        raise ValueError(
            f"there must be a reference for each text, but the number of texts is "
            f"{len(texts)}, and the number of references is {len(references)}."
        )
    is_translator = isinstance(model, Translator)
    if not is_translator and (references is not None or target_lang is not None or search):
        raise ValueError(
            "a language model has no references, target languages or search options. Leave them "
            "out."
        )
    given = texts if references is None else references
    kept = [
        number
        for number, (text, other) in enumerate(zip(texts, given, strict=True))
        if text.strip() and other.strip()
    ]
    with tqdm(total=len(kept), unit=" lines", disable=not progress) as bar:
        for first in range(0, len(kept), CHUNK_LINES):
            lines = kept[first : first + CHUNK_LINES]
            own = [texts[number] for number in lines]
            if isinstance(model, LanguageModel):
                yield _read_lines(model, lines, own, with_inputs)
            elif references is not None:
                targets = [references[number] for number in lines]
                yield _read_pairs(model, lines, own, targets, target_lang, with_inputs)
            else:
                yield _read_own(model, lines, own, target_lang, with_inputs, search)
            bar.update(len(lines))


def _read_lines(
    model: LanguageModel, lines: list[int], texts: list[str], with_inputs: bool
) -> list[Reading]:
    scores = model.score(texts, with_experts=True, with_inputs=with_inputs)
    return [
        Reading(line, [], score, _present(decoder=score.routing))
        for line, score in zip(lines, scores, strict=True)
    ]


def _read_pairs(
    model: Translator,
    lines: list[int],
    texts: list[str],
    references: list[str],
    target_lang: str | None,
    with_inputs: bool,
) -> list[Reading]:
    scores = model.score(texts, references, target_lang, with_experts=True, with_inputs=with_inputs)
    return [_of_pair(line, score) for line, score in zip(lines, scores, strict=True)]


def _read_own(
    model: Translator,
    lines: list[int],
    texts: list[str],
    target_lang: str | None,
    with_inputs: bool,
    search: dict[str, Any],
) -> list[Reading]:
    translations = model.translate(texts, target_lang, **search)
    sentences = [
        (line, sentence)
        for line, translation in zip(lines, translations, strict=True)
        for sentence in translation.sentences
    ]
    scores = model.score_pieces(
        [sentence.pieces for _, sentence in sentences],
        [sentence.hypotheses[0].pieces for _, sentence in sentences],
        target_lang,
        with_experts=True,
        with_inputs=with_inputs,
    )
    return [_of_pair(line, score) for (line, _), score in zip(sentences, scores, strict=True)]


def _of_pair(line: int, score: PairScore) -> Reading:
    routings = _present(encoder=score.routing, decoder=score.target.routing)
    return Reading(line, score.source_tokens, score.target, routings)


def _present(**routings: Routing | None) -> dict[str, Routing]:
    return {side: routing for side, routing in routings.items() if routing is not None}
