"""A model reads a text, and what its experts did is collected."""

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

# Lines that are read at once: enough for batches of about equally long sentences.
CHUNK_LINES = 128


@dataclass(frozen=True)
class Reading:
    """A sentence as a model read it.

    Attributes:
        line: Its index in the text.
        source_tokens: S, what the encoder read; empty of a language model.
        target: The score of what was written: the reference, the model's own translation, or the
            line of a language model.
        routings: Of the layers "encoder", for each of `source_tokens`, and "decoder", for each
            piece of the target and the end mark; only the layers that the model has.
    """

    line: int
    source_tokens: list[str]
    target: LineScore
    routings: dict[str, Routing]


@dataclass(frozen=True)
class TextUsage:
    """How a model's experts are used over a text.

    Attributes:
        layers: Of "encoder" and "decoder": those that the model has.
        score: Of the references or of a language model's text; of the model's own translations
            otherwise. None if all lines are blank.
        num_lines: Of the text.
        num_blank: Lines that are left out: they, or their references, are blank.
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
    """Run a model over a text and count how its experts are used.

    Args:
        model: What reads.
        texts: Lines; blank ones are left out.
        references: A translation of each, which the decoder reads as it is given (teacher
            forcing). Without, it reads the model's own translations.
        target_lang: Of a multilingual model.
        progress: Show a bar on standard error.
        search: Options of `Translator.translate`, without references.

    Raises:
        ValueError: as `read_text`.
    """
    layers = {side: ExpertUsage(moe.config.num_experts) for side, moe in model.moe_layers.items()}
    scores, lines = [], set()
    for chunk in read_text(
        model, texts, references, target_lang, progress=progress, with_inputs=False, **search
    ):
        add_readings(layers, chunk)
        scores += [replace(one.target, routing=None) for one in chunk]  # it would fill memory
        lines |= {one.line for one in chunk}
    total = total_score(scores) if scores else None
    return TextUsage(layers, total, len(texts), len(texts) - len(lines))


def add_readings(layers: dict[str, ExpertUsage], readings: Sequence[Reading]) -> None:
    """Add sentences to the usage of each layer."""
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
    """Yield the sentences of a text, some lines at a time.

    Lines that are blank, or whose reference is, are left out. Arguments are those of
    `collect_usage`; `with_inputs` keeps what the MoE layers read.

    Raises:
        ValueError: there are more texts than references or fewer; a language model is given what
            only a translator knows; or as of `Translator.translate`.
    """
    if references is not None and len(references) != len(texts):
        raise ValueError(
            f"there must be a reference for each text, but there are {len(texts)} texts and "
            f"{len(references)} references."
        )
    is_translator = isinstance(model, Translator)
    if not is_translator and (references is not None or target_lang is not None or search):
        raise ValueError("a language model has no references, target languages or search.")
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
