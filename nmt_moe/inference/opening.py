"""Open and verify bundles."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from nmt_moe.inference.bundle import (
    CONFIG,
    EXPORT_AGAIN,
    SUMS,
    VOCABULARY,
    BundleConfig,
    check_content,
    check_file,
    parse_config,
    read_small,
    read_sums,
)
from nmt_moe.inference.networks import LanguageNetwork, TranslationNetwork
from nmt_moe.inference.weights import ExpertWeights, Weights, experts_file
from nmt_moe.nn import GNMTConfig
from nmt_moe.text.vocabulary import MARKS, Vocabulary

Processor = sentencepiece.SentencePieceProcessor

SIDES = {"translation": ("source", "target"), "language_model": ("target",)}
JOINT_PIECES = "pieces.model"


def language_mark(language: str) -> str:
    """Return the symbol that requests a target language at the start of the source.

    Source: Johnson et al. 2017, section 3.
    """
    return f"<2{language}>"


@dataclass(frozen=True)
class Bundle:
    """An open bundle.

    Attributes:
        folder: Folder of the bundle.
        config: Configuration of the bundle.
        vocabularies: Vocabularies of "source" and "target"; a language model has only a "target".
        processors: sentencepiece models by the same names; None if text is split at spaces.
        network: Network of the bundle, with weights mapped from the files.
    """

    folder: Path
    config: BundleConfig
    vocabularies: dict[str, Vocabulary]
    processors: dict[str, Processor | None]
    network: TranslationNetwork | LanguageNetwork


def open_bundle(folder: Path | str, kind: str) -> Bundle:
    """Open a bundle.

    Every file is compared with its SHA-256 hash, except for the files of experts. Each expert is
    compared with its own hash before its first use.

    Args:
        folder: A folder that `nmt-moe export` wrote.
        kind: Required kind of model, "translation" or "language_model".

    Raises:
        ValueError: if a file is missing, changed, too new or inconsistent, or the model is of
            another kind; the message names the file or the folder.
    """
    folder = Path(folder)
    content = read_small(folder, CONFIG)
    config = parse_config(folder / CONFIG, content)
    if config.kind != kind:
        names = {"translation": "Translator", "language_model": "LanguageModel"}
        raise ValueError(
            f"`{folder}` is for `nmt_moe.{names[config.kind]}`, not for `nmt_moe.{names[kind]}`."
        )
    sums = _read_sums(folder, config)
    check_content(folder, CONFIG, sums, content)
    vocabularies = _read_vocabularies(folder, config, sums)
    processors = _read_processors(folder, config, vocabularies, sums)
    sizes = {"decoder": len(vocabularies["target"])}
    if "source" in vocabularies:
        sizes |= {"encoder": len(vocabularies["source"]), "output": len(vocabularies["target"])}
    with torch.no_grad():
        weights = Weights(folder, config, sizes, sums)
        network = (
            TranslationNetwork(folder, weights)
            if kind == "translation"
            else LanguageNetwork(folder, weights)
        )
    return Bundle(folder, config, vocabularies, processors, network)


def _models(bundle: Bundle) -> dict[str, bytes | None]:
    """Return the contents of a bundle's sentencepiece models."""
    return {
        side: None if one is None else one.serialized_model_proto()
        for side, one in bundle.processors.items()
    }


def check_same(first: Bundle, other: Bundle) -> None:
    """Reject bundles that cannot form an ensemble."""
    pairs: dict[str, list[Any]] = {
        "vocabulary": [{s: v.symbols for s, v in b.vocabularies.items()} for b in (first, other)],
        "pieces": [_models(bundle) for bundle in (first, other)],
        "languages": [bundle.config.languages for bundle in (first, other)],
        "text pipeline": [bundle.config.text for bundle in (first, other)],
    }
    for what, (one, two) in pairs.items():
        if one != two:
            raise ValueError(
                f"`{first.folder}` and `{other.folder}` cannot form an ensemble: they differ in "
                f"their {what}. Name models that were trained on the same data."
            )


def verify_bundle(folder: Path | str) -> str:
    """Read a whole bundle, and compare every file and every expert with its digest.

    Returns:
        A description of its contents.

    Raises:
        ValueError: if something is missing, changed or inconsistent; the message names it.
    """
    folder = Path(folder)
    config = parse_config(folder / CONFIG, read_small(folder, CONFIG))
    sums = _read_sums(folder, config)
    for name in sums:
        check_file(folder, name, sums)
    open_bundle(folder, config.kind)
    size = sum((folder / name).stat().st_size for name in sums)
    counts = []
    for side in _expert_sides(config):
        moe = config.moe_of(side)
        assert moe is not None
        counts.append(moe.num_experts)
        experts_of_side = ExpertWeights(folder, side, moe, config.dtype)
        for expert in range(moe.num_experts):
            experts_of_side.check(expert)
    experts = f", {' and '.join(map(str, sorted(set(counts))))} experts per layer" if counts else ""
    return (
        f"complete: {config.kind.replace('_', ' ')} `{config.architecture}`, "
        f"{config.dtype}{experts}, {len(sums)} files, {size / 1e6:.1f} MB"
    )


def _read_sums(folder: Path, config: BundleConfig) -> dict[str, str]:
    sums = read_sums(folder)
    for name in map(experts_file, _expert_sides(config)):
        if name not in sums:
            raise ValueError(f"`{folder / SUMS}` does not list `{name}`. {EXPORT_AGAIN}")
    return sums


def _expert_sides(config: BundleConfig) -> list[str]:
    if config.network.moe is None:
        return []
    if isinstance(config.network, GNMTConfig):
        return ["encoder", "decoder"]
    return ["decoder"] if config.network.expert_layers == 1 else []


def _read_vocabularies(
    folder: Path, config: BundleConfig, sums: dict[str, str]
) -> dict[str, Vocabulary]:
    path, content = folder / VOCABULARY, read_small(folder, VOCABULARY)
    check_content(folder, VOCABULARY, sums, content)
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is not JSON: {error}. {EXPORT_AGAIN}") from None
    marks = [language_mark(name) for name in config.languages] if config.is_multilingual else []
    vocabularies = {}
    for side in SIDES[config.kind]:
        symbols: Any = table.get(side, table.get("shared")) if isinstance(table, dict) else None
        is_list = isinstance(symbols, list) and _are_symbols(symbols)
        if not is_list or tuple(symbols[: len(MARKS)]) != MARKS:
            raise ValueError(f"`{path}` has no list of {side} symbols. {EXPORT_AGAIN}")
        missing = [mark for mark in marks if mark not in symbols]
        if missing:
            raise ValueError(f"`{path}` lacks the language token `{missing[0]}`. {EXPORT_AGAIN}")
        vocabularies[side] = Vocabulary(symbols, marks)
    return vocabularies


def _are_symbols(values: list[Any]) -> bool:
    """Return whether all values are texts that can be part of a line."""
    if not all(isinstance(value, str) for value in values):
        return False
    return re.search("[\n\ud800-\udfff]", "".join(values)) is None


def _read_processors(
    folder: Path, config: BundleConfig, vocabularies: dict[str, Vocabulary], sums: dict[str, str]
) -> dict[str, Processor | None]:
    """Return the sentencepiece model of each side; both sides may share one."""
    processors: dict[str, Processor | None] = dict.fromkeys(vocabularies)
    if not config.has_pieces:
        return processors
    loaded: dict[str, Processor] = {}
    for side, vocabulary in vocabularies.items():
        name = JOINT_PIECES if JOINT_PIECES in sums else f"{side}.model"
        if name not in loaded:
            content = read_small(folder, name)
            check_content(folder, name, sums, content)
            loaded[name] = load_pieces(content, str(folder / name), EXPORT_AGAIN)
        processors[side] = loaded[name]
        check_pieces(loaded[name], vocabulary, str(folder / name), EXPORT_AGAIN)
    return processors


def load_pieces(content: bytes, name: str, advice: str) -> Processor:
    """Load a sentencepiece model.

    Raises:
        ValueError: if it is not a complete model.
    """
    processor = Processor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:
        raise ValueError(f"`{name}` is not a complete sentencepiece model. {advice}") from None
    return processor


# Share of a vocabulary's words that need not be pieces of the model, because texts contain runs of
# characters that no piece covers.
FOREIGN_SHARE = 0.05


def check_pieces(processor: Processor, vocabulary: Vocabulary, name: str, advice: str) -> None:
    """Reject a sentencepiece model that does not belong to a vocabulary.

    Raises:
        ValueError: if too many of the vocabulary's words are not pieces of the model.
    """
    pieces = {processor.id_to_piece(number) for number in range(len(processor))}
    own = set(MARKS) | set(vocabulary.language_marks)
    words = {s for s in vocabulary.symbols if not s.startswith("madeupword")} - own
    # Ignore single characters, which may be unknown to the model.
    foreign = sorted(w for w in words - pieces if len(w.removeprefix("▁")) > 1)
    if len(foreign) > FOREIGN_SHARE * len(words):
        raise ValueError(
            f"`{name}` does not fit the vocabulary: {len(foreign)} of the vocabulary's "
            f"{len(words)} words, such as {foreign[0]!r}, are not pieces of the model. {advice}"
        )
