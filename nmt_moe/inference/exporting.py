"""Turn a checkpoint into a bundle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from nmt_moe.checkpoints import load_checkpoint
from nmt_moe.checkpoints.files import check_output
from nmt_moe.checkpoints.network import SavedNetwork, read_network
from nmt_moe.checks import check_choice
from nmt_moe.inference.bundle import (
    CARD,
    CONFIG,
    DTYPES,
    SUMS,
    VOCABULARY,
    WEIGHTS,
    BundleConfig,
    SearchDefaults,
    TextPipeline,
    is_bundle,
)
from nmt_moe.inference.card import Origin, write_card
from nmt_moe.inference.opening import (
    JOINT_PIECES,
    check_pieces,
    language_mark,
    load_pieces,
    verify_bundle,
)
from nmt_moe.inference.storing import write_weights
from nmt_moe.inference.weights import experts_file
from nmt_moe.nn import GNMTConfig
from nmt_moe.text.digests import write_digests
from nmt_moe.text.vocabulary import Vocabulary, find_dictionary, read_symbols

BUNDLE_FILES = {
    *(CONFIG, VOCABULARY, WEIGHTS, CARD, SUMS),
    *(JOINT_PIECES, "source.model", "target.model"),
    *map(experts_file, ("encoder", "decoder")),
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pieces:
    """The sentencepiece models used in training.

    Attributes:
        source: Model of the source, or of both sides.
        target: Model of the target, if it has its own.
    """

    source: Path | None = None
    target: Path | None = None


@dataclass(frozen=True)
class Description:
    """The information in a bundle besides its weights.

    Attributes:
        languages: [source, target], if neither the checkpoint nor its data names them.
        text: Steps applied to source text before it is split into pieces.
        search: Defaults of the search.
        scores: Text for the model card.
    """

    languages: tuple[str, ...] = ()
    text: TextPipeline = field(default_factory=TextPipeline)
    search: SearchDefaults = field(default_factory=SearchDefaults)
    scores: str = ""


def export(
    checkpoint: Path,
    data: Path,
    pieces: Pieces,
    output: Path,
    dtype: str = "float32",
    description: Description | None = None,
    is_overwritten: bool = False,
) -> str:
    """Write a checkpoint as a bundle.

    Args:
        checkpoint: A checkpoint from one or several processes, averaged or not.
        data: The folder of binarised data that the model was trained on.
        pieces: The sentencepiece models that split the training texts.
        output: The folder to write; it appears once it is complete.
        dtype: The dtype of stored weights, one of `DTYPES`.
        description: Languages, text pipeline, search defaults and scores.
        is_overwritten: Whether to replace an existing output.

    Returns:
        A description of the bundle.

    Raises:
        ValueError: if something is missing or inconsistent; the message names it.
    """
    check_choice("dtype", dtype, DTYPES)
    check_output(output, is_overwritten)
    check_replaceable(output)
    description = description or Description()
    state = load_checkpoint(checkpoint, with_optimizer=False)
    network = read_network(checkpoint, state)
    languages, directions = _find_languages(state, data, network, description.languages)
    vocabularies = _find_vocabularies(state, data, network, languages, directions)
    _check_sizes(checkpoint, network, vocabularies)
    _check_digests(checkpoint, state, vocabularies)
    if pieces.source is None:
        _warn_of_pieces(data, vocabularies)
    shared = _find_shared(network.parameters)
    config = BundleConfig(
        kind="translation" if isinstance(network.config, GNMTConfig) else "language_model",
        architecture=network.architecture,
        dtype=dtype,
        network=network.config,
        languages=languages,
        directions=directions,
        text=description.text,
        search=description.search,
        has_pieces=pieces.source is not None,
        shared_weights=shared,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as scratch:
        part = Path(scratch) / "bundle"
        part.mkdir()
        _write_pieces(part, pieces, vocabularies, config)
        write_weights(part, config, network.parameters)
        (part / CONFIG).write_text(config.to_json(), encoding="utf-8")
        table = {side: vocabulary.symbols for side, vocabulary in vocabularies.items()}
        if len(table) == 2 and table["source"] == table["target"]:
            table = {"shared": table["source"]}
        content = json.dumps(table, ensure_ascii=False, indent=0)
        (part / VOCABULARY).write_text(content, encoding="utf-8")
        origin = Origin(checkpoint, data, state, description.scores)
        (part / CARD).write_text(write_card(config, origin, vocabularies), encoding="utf-8")
        names = sorted(path.name for path in part.iterdir())
        write_digests(part / SUMS, [part / name for name in names])
        summary = verify_bundle(part)
        if output.is_dir():
            output.rename(Path(scratch) / "replaced")
        part.rename(output)
    return summary


def check_replaceable(output: Path) -> None:
    """Reject an output if replacing it would delete anything other than a bundle."""
    if not output.name:
        raise ValueError(f"`{output}` has no name. Name the folder to write.")
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise ValueError(f"`{output}` is not a folder. Specify another output.")
    there = {path.name for path in output.iterdir()}
    if there and not is_bundle(output):
        raise ValueError(f"`{output}` is a folder, but not a bundle. Specify another output.")
    foreign = there - BUNDLE_FILES
    if foreign:
        raise ValueError(
            f"`{output}` also contains `{min(foreign)}`, which is not part of a bundle. Move it, "
            "or name another output."
        )


def _find_languages(
    state: Mapping[str, Any], data: Path, network: SavedNetwork, given: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the languages, and the directions of a multilingual model."""
    task = state.get("task_state") or {}
    if "languages" in task:
        if given:
            raise ValueError(
                "`--source-lang` and `--target-lang` must be left out for a multilingual model, "
                f"which names its languages itself: {', '.join(task['languages'])}."
            )
        return tuple(task["languages"]), tuple(task.get("pairs") or ())
    if not isinstance(network.config, GNMTConfig):
        return given[:1], ()
    cfg: Any = state.get("cfg") or {}
    options = cfg.get("task") or {}
    options = options if isinstance(options, dict) else vars(options)
    if len(given) == 1:
        raise ValueError("`--source-lang` and `--target-lang` must be set together or not at all.")
    if given:
        return given, ()
    if options.get("source_lang") and options.get("target_lang"):
        return (options["source_lang"], options["target_lang"]), ()
    found = {path.name.split(".")[1] for path in data.glob("train*.*-*.*.idx")}
    if not any(data.glob("dict*.txt")):
        raise ValueError(
            f"`{data}` contains no dictionary. Name the folder that fairseq-preprocess wrote."
        )
    if len(found) != 1:
        raise ValueError(
            f"the checkpoint does not name its languages, and `{data}` has training text for "
            f"{len(found)} pairs. Add --source-lang and --target-lang."
        )
    source, _, target = found.pop().partition("-")
    return (source, target), ()


def _find_vocabularies(
    state: Mapping[str, Any],
    data: Path,
    network: SavedNetwork,
    languages: tuple[str, ...],
    directions: tuple[str, ...],
) -> dict[str, Vocabulary]:
    if not data.is_dir():
        raise ValueError(f"`{data}` is not a folder. Name a folder that fairseq-preprocess wrote.")
    if directions:
        symbols = state["task_state"]["symbols"]
        own = read_symbols(find_dictionary(data, languages[0]))
        if symbols[: len(own)] != own:
            raise ValueError(
                f"the dictionary of `{data}` is not the one that the checkpoint was trained with. "
                "Name the data folder used in training."
            )
        vocabulary = Vocabulary(symbols, [language_mark(name) for name in languages])
        return {"source": vocabulary, "target": vocabulary}
    if not isinstance(network.config, GNMTConfig):
        return {"target": Vocabulary(read_symbols(find_dictionary(data, None)))}
    source, target = languages
    return {
        "source": Vocabulary(read_symbols(find_dictionary(data, source))),
        "target": Vocabulary(read_symbols(find_dictionary(data, target))),
    }


def _check_sizes(path: Path, network: SavedNetwork, vocabularies: dict[str, Vocabulary]) -> None:
    rows = {"source": "encoder.embedding.weight", "target": "decoder.embedding.weight"}
    for side, vocabulary in vocabularies.items():
        weight = network.parameters.get(rows[side])
        have = None if weight is None else len(weight)
        if have != len(vocabulary):
            raise ValueError(
                f"`{path}` has {have} {side} symbols, but the {side} dictionary has "
                f"{len(vocabulary)}. Name the `--data` that the model was trained on."
            )


def _warn_of_pieces(data: Path, vocabularies: dict[str, Vocabulary]) -> None:
    """Warn if a bundle without a sentencepiece model has the vocabulary of one."""
    symbols = [symbol for vocabulary in vocabularies.values() for symbol in vocabulary.symbols]
    num_pieces = sum("▁" in symbol for symbol in symbols)
    if num_pieces > len(symbols) / 20:
        logger.warning(
            "%d of the %d symbols in the dictionary of `%s` contain ▁, as sentencepiece's do, but "
            "`--pieces` is missing, so the bundle expects text that is already split into pieces, "
            "and returns such text. To translate plain text, export the checkpoint with the "
            "sentencepiece model that split the training text.",
            num_pieces,
            len(symbols),
            data,
        )


def _check_digests(
    path: Path, state: Mapping[str, Any], vocabularies: dict[str, Vocabulary]
) -> None:
    """Reject a dictionary that was not used in training, if the checkpoint has a digest."""
    sides = {"source": "encoder", "target": "decoder"}
    for side, vocabulary in vocabularies.items():
        digest = state["model"].get(f"{sides[side]}.dictionary_check.digest")
        symbols = "\n".join(vocabulary.symbols).encode()
        number = int.from_bytes(hashlib.sha256(symbols).digest()[:8], "little", signed=True)
        if digest is not None and int(digest) != number:
            raise ValueError(
                f"the {side} dictionary is not the one that `{path}` was trained with, though it "
                "has the same size. Name the `--data` that the model was trained on."
            )


def _find_shared(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the name of each table that equals an earlier table to the earlier table's name."""
    names = ("encoder.embedding.weight", "decoder.embedding.weight", "decoder.output.weight")
    there = [name for name in names if name in parameters]
    shared = {}
    for number, name in enumerate(there):
        for earlier in there[:number]:
            if earlier not in shared and torch.equal(parameters[name], parameters[earlier]):
                shared[name] = earlier
                break
    return shared


def _write_pieces(
    folder: Path, pieces: Pieces, vocabularies: dict[str, Vocabulary], config: BundleConfig
) -> None:
    if pieces.source is None:
        return
    target = pieces.target or pieces.source
    files = {"source": pieces.source, "target": target}
    contents = {side: files[side].read_bytes() for side in vocabularies}
    advice = "With `--pieces`, name the model that split the training texts."
    for side, content in contents.items():
        processor = load_pieces(content, str(files[side]), advice)
        check_pieces(processor, vocabularies[side], str(files[side]), advice)
    if len(set(contents.values())) == 1:
        contents = {JOINT_PIECES.removesuffix(".model"): contents["target"]}
    for side, content in contents.items():
        (folder / f"{side}.model").write_bytes(content)
