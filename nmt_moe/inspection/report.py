"""Report on a model and a text in plain values, for the page and for notebooks.

`docs/report.md` describes the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nmt_moe import __version__
from nmt_moe.inference import LanguageModel, LineScore, Routing, Translator, total_score
from nmt_moe.inference.bundle import CONFIG, parse_config, read_small
from nmt_moe.inspection.layer import LayerReport, make_layers
from nmt_moe.inspection.quality import language_of, score_translations
from nmt_moe.inspection.reading import CHUNK_LINES, Reading, read_text
from nmt_moe.inspection.sentences import MIN_SENTENCES, NUM_SENTENCES, Part, show_sentences

FORMAT, VERSION = "nmt_moe report", 1


def load_model(folder: Path | str) -> Translator | LanguageModel:
    """Open a bundle of a translation model or a language model.

    Raises:
        ValueError: if a file is missing, changed or of a newer format. The message names it.
    """
    folder = Path(folder)
    config = parse_config(folder / CONFIG, read_small(folder, CONFIG))
    return (Translator if config.kind == "translation" else LanguageModel).load(folder)


def make_report(
    folder: Path | str,
    parts: Sequence[Part],
    against: Path | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run a bundle over a text, and describe how it uses its experts and how well it translates.

    Args:
        folder: Folder of the bundle.
        parts: Parts of the text, such as one for each language.
        against: Another bundle to compare with, from another model or from another checkpoint of
            this model.
        progress: Whether to show progress bars on standard error.

    Returns:
        The report, in values that can be written as JSON.

    Raises:
        ValueError: if a bundle cannot be opened or is of another kind, the model does not know a
            language, or there is nothing to read.
    """
    model = load_model(folder)
    other = None if against is None else load_model(against)
    if other is not None and type(other) is not type(model):
        raise ValueError(
            f"`{against}` and `{folder}` must be of the same kind, but one is a translator and one "
            "a language model. Name two bundles of the same kind."
        )
    for one in (model, other):
        if one is not None:
            _check_parts(one, parts)
    names = [part.name for part in parts]
    layers = make_layers(model, names)
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": VERSION,
        "nmt_moe": __version__,
        "model": _describe_model(folder, model),
        "against": None if against is None or other is None else _describe_model(against, other),
        "parts": [],
    }
    for number, part in enumerate(parts):
        content["parts"].append(_read_part(model, other, part, number, layers, progress))
    if not any(part["sentences"] for part in content["parts"]):
        raise ValueError("all lines of the text are blank: there is nothing to read.")
    content["layers"] = [layer.to_dict() for layer in layers.values()]
    most = max(MIN_SENTENCES, NUM_SENTENCES // len(parts))
    content["sentences"] = [row for part in parts for row in show_sentences(model, part, most)]
    return content


def _check_parts(model: Translator | LanguageModel, parts: Sequence[Part]) -> None:
    """Reject languages and references that the model cannot use, before anything is read."""
    if not parts:
        raise ValueError("`parts` must have at least one text, but is empty.")
    for part in parts:
        if isinstance(model, Translator):
            model.translate([], part.target_lang)
        elif part.references is not None or part.target_lang is not None:
            raise ValueError("a language model has neither references nor target languages.")


def _describe_model(folder: Path | str, model: Translator | LanguageModel) -> dict[str, Any]:
    config = model.config
    moe = config.network.moe
    return {
        "name": Path(folder).resolve().name,
        "kind": config.kind,
        "architecture": config.architecture,
        "dtype": config.dtype,
        "languages": list(config.languages),
        "directions": list(config.directions),
        "model_dim": config.network.model_dim,
        "num_experts": moe.num_experts if moe is not None and model.moe_layers else 0,
    }


def _read_part(
    model: Translator | LanguageModel,
    other: Translator | LanguageModel | None,
    part: Part,
    number: int,
    layers: dict[str, LayerReport],
    progress: bool,
) -> dict[str, Any]:
    scores: list[LineScore] = []
    theirs: list[LineScore] = []
    lines: set[int] = set()
    for chunk in read_text(
        model,
        part.text,
        part.references,
        part.target_lang,
        progress=progress,
        with_inputs=True,
    ):
        for layer in layers.values():
            layer.add(number, chunk)
        # Keeping the routing would fill the memory.
        scores += [replace(one.target, routing=None) for one in chunk]
        lines |= {one.line for one in chunk}
        if other is not None:
            theirs += _read_again(model, other, part, chunk, layers)
    content: dict[str, Any] = {
        "part": part.name,
        "target_lang": part.target_lang,
        "lines": len(part.text),
        "sentences": len(scores),
        "blank": len(part.text) - len(lines),
        "is_reference": part.references is not None or isinstance(model, LanguageModel),
        "perplexity": _perplexities(scores),
        "other_perplexity": _perplexities(theirs),
    }
    if isinstance(model, Translator) and part.references is not None and lines:
        content["quality"] = _score_part(model, other, part, sorted(lines), progress)
    return content


def _perplexities(scores: list[LineScore]) -> dict[str, Any] | None:
    if not scores:
        return None
    total = total_score(scores)
    return {
        "per_piece": total.perplexity_per_piece,
        "per_word": total.perplexity_per_word,
        "per_character": total.perplexity_per_character,
        "pieces": len(total.log_probs),
        "unknown": total.num_unknown,
    }


def _read_again(
    model: Translator | LanguageModel,
    other: Translator | LanguageModel,
    part: Part,
    chunk: Sequence[Reading],
    layers: dict[str, LayerReport],
) -> list[LineScore]:
    """Let the other model read the same text, and compare the routing of identical tokens."""
    lines = [one.line for one in chunk]
    again: list[tuple[dict[str, Routing | None], list[str], LineScore]]
    if isinstance(other, LanguageModel):
        scores = other.score([part.text[n] for n in lines], with_experts=True)
        again = [({"decoder": one.routing}, [], one) for one in scores]
    elif part.references is not None:
        references = [part.references[n] for n in lines]
        texts = [part.text[n] for n in lines]
        pairs = other.score(texts, references, part.target_lang, with_experts=True)
        again = [
            ({"encoder": p.routing, "decoder": p.target.routing}, p.source_tokens, p.target)
            for p in pairs
        ]
    else:
        return []  # its own translations are different texts
    for side, layer in layers.items():
        moe = other.moe_layers.get(side)
        if moe is None or moe.config.num_experts != layer.moe.config.num_experts:
            continue
        if other.vocabularies["target"].symbols != model.vocabularies["target"].symbols:
            continue
        same = [
            (routings[side], one.routings[side])
            for one, (routings, tokens, score) in zip(chunk, again, strict=True)
            if tokens == one.source_tokens and score.pieces == one.target.pieces
        ]
        before = [routing for routing, _ in same if routing is not None]
        if before:
            layer.compare(before, [routing for _, routing in same])
    return [replace(score, routing=None) for _, _, score in again]


def _score_part(
    model: Translator,
    other: Translator | LanguageModel | None,
    part: Part,
    lines: list[int],
    progress: bool,
) -> dict[str, Any]:
    assert part.references is not None
    sources = [part.text[n] for n in lines]
    references = [part.references[n] for n in lines]
    hypotheses = _translate(model, sources, part.target_lang, progress)
    others = None
    if isinstance(other, Translator):
        others = _translate(other, sources, part.target_lang, progress)
    names = (part.language, part.target_lang, *model.languages[:1])
    language = next((name for name in map(language_of, names) if name is not None), None)
    return score_translations(sources, hypotheses, references, language, others, lines)


def _translate(
    model: Translator, sources: list[str], target_lang: str | None, progress: bool
) -> list[str]:
    results: list[str] = []
    with tqdm(total=len(sources), unit=" translations", disable=not progress) as bar:
        for first in range(0, len(sources), CHUNK_LINES):
            chunk = model.translate(sources[first : first + CHUNK_LINES], target_lang)
            results += [one.text for one in chunk]
            bar.update(len(chunk))
    return results
