"""Define the format of a bundle, a folder with a trained model that works without fairseq.

    config.json               format, network, languages, text pipeline, search defaults
    vocabulary.json           {"source": symbols, "target": symbols}, or {"shared": symbols}
    source.model, target.model  sentencepiece models; `pieces.model` if both sides share one
    model.safetensors         all weights except the experts' weights
    experts.encoder.safetensors, experts.decoder.safetensors
                              experts, each with its SHA-256 hash, so that only the experts that a
                              sentence uses have to be read
    README.md                 the model card
    SHA256SUMS                the SHA-256 hashes of all files above, for `nmt-moe verify` and
                              `sha256sum --check`

Nothing in a bundle is executed: JSON, safetensors and sentencepiece's format contain only numbers
and text. Weights are mapped from their files instead of being read as a whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nmt_moe.checks import check_choice, check_range, check_whole
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, LSTMLMConfig
from nmt_moe.text.digests import compute_sha256

FORMAT = "nmt_moe bundle"
VERSION = 1
CONFIG, VOCABULARY, WEIGHTS, CARD, SUMS = (
    "config.json",
    "vocabulary.json",
    "model.safetensors",
    "README.md",
    "SHA256SUMS",
)
DTYPES = ("float32", "bfloat16", "int8")
KINDS = {"translation": GNMTConfig, "language_model": LSTMLMConfig}
# Maximum sizes. A larger file cannot be genuine.
MAX_BYTES = {CONFIG: 2**20, VOCABULARY: 2**28, SUMS: 2**20}
ROW = re.compile(r"([0-9a-f]{64})  ([^/\\\0]+)")

EXPORT_AGAIN = "Copy the folder again, or export the model again with `nmt-moe export`."


@dataclass(frozen=True)
class SearchDefaults:
    """The default options of `translate`, named as in `BeamConfig`.

    Attributes:
        max_len_a, max_len_b: The numbers a and b: for a source of S tokens, including its end mark,
            a translation has at most a S + b pieces before its end mark.
    """

    beam_size: int = 5
    length_exponent: float = 1.0
    length_penalty_alpha: float = 0.0
    coverage_penalty_beta: float = 0.0
    beam_prune: float = 0.0
    max_len_a: float = 0.0
    max_len_b: int = 200

    def __post_init__(self) -> None:
        check_whole("beam_size", self.beam_size, 1, 1000)
        check_range("length_exponent", self.length_exponent, -100.0, 100.0)
        for name in ("length_penalty_alpha", "coverage_penalty_beta", "beam_prune"):
            check_range(name, getattr(self, name), 0.0, 1e6)
        check_range("max_len_a", self.max_len_a, 0.0, 100.0)
        check_whole("max_len_b", self.max_len_b, 1, 100_000)


@dataclass(frozen=True)
class TextPipeline:
    """Steps applied to source text before it is split into pieces, as in training.

    Attributes:
        lowercase: Whether to convert the text to lower case.
        normalize_punctuation: Whether to normalise punctuation as Moses does.
        max_source_pieces: Maximum number of pieces of a source; longer texts are split into
            sentences, and longer sentences are cut.
    """

    lowercase: bool = False
    normalize_punctuation: bool = False
    max_source_pieces: int = 128

    def __post_init__(self) -> None:
        for name in ("lowercase", "normalize_punctuation"):
            _check_bool(name, getattr(self, name))
        check_whole("max_source_pieces", self.max_source_pieces, 8, 100_000)


@dataclass(frozen=True)
class BundleConfig:
    """The contents of `config.json`.

    Attributes:
        kind: Kind of model, "translation" or "language_model".
        architecture: Name of the network's architecture in fairseq.
        dtype: The dtype of the stored weights, one of `DTYPES`.
        network: Sizes of the network.
        languages: Names of the languages: [source, target] for one direction; for a multilingual
            model, all languages that have a token `<2xx>` in the vocabulary. May be empty.
        directions: Directions such as "en-fr" that a multilingual model was trained on; empty for
            other models.
        text: Steps applied to text before it is split into pieces.
        search: Defaults of the search.
        has_pieces: Whether there are sentencepiece models; if not, text is split at spaces.
        shared_weights: Maps each weight that is not stored to the name of the weight it shares.
    """

    kind: str
    architecture: str
    dtype: str
    network: GNMTConfig | LSTMLMConfig
    languages: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    text: TextPipeline = field(default_factory=TextPipeline)
    search: SearchDefaults = field(default_factory=SearchDefaults)
    has_pieces: bool = True
    shared_weights: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(KINDS))
        check_choice("dtype", self.dtype, DTYPES)
        _check_bool("has_pieces", self.has_pieces)
        if not isinstance(self.architecture, str):
            raise ValueError(f"`architecture` must be a name, but is {self.architecture!r}.")
        if not all(isinstance(value, str) for value in self.shared_weights.values()):
            raise ValueError("`shared_weights` must be a table of names.")

    @property
    def is_multilingual(self) -> bool:
        """Return whether a language token before the source names the target language."""
        return bool(self.directions)

    def moe_of(self, side: str) -> MoEConfig | None:
        """Return the sizes of the MoE layer of "encoder" or "decoder", if it has one."""
        network = self.network
        if isinstance(network, GNMTConfig):
            return network.moe if side == "encoder" else network.decoder_moe
        return network.moe if side == "decoder" else None

    def to_json(self) -> str:
        """Return the configuration as the text of `config.json`."""
        content = {"format": FORMAT, "format_version": VERSION, **asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, but is {value!r}.")


def parse_config(path: Path, content: bytes) -> BundleConfig:
    """Parse `config.json`.

    Raises:
        ValueError: if the file does not belong to a bundle, or has another format version or
            impossible values.
    """
    try:
        table = json.loads(content)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is not JSON: {error}. {EXPORT_AGAIN}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(
            f"`{path}` is not the configuration of a bundle: `format` is not '{FORMAT}'. Name a "
            "folder that `nmt-moe export` wrote."
        )
    version = table.pop("format_version", None)
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"`{path}` has the format version {version!r}, but this version of nmt_moe reads "
            f"{VERSION}. Install a newer version, or export the model again."
        )
    del table["format"]
    try:
        check_choice("kind", str(table.get("kind")), tuple(KINDS))
        network = _table(table, "network")
        moe = network.pop("moe", None)
        moe = None if moe is None else MoEConfig(**moe)
        table["network"] = KINDS[table["kind"]](**network, moe=moe)
        table["text"] = TextPipeline(**_table(table, "text"))
        table["search"] = SearchDefaults(**_table(table, "search"))
        for name in ("languages", "directions"):
            table[name] = _names(table, name)
        table["shared_weights"] = _table(table, "shared_weights")
        return BundleConfig(**table)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{path}` cannot be used: {error}. {EXPORT_AGAIN}") from None


def is_bundle(folder: Path) -> bool:
    """Return whether a folder has a bundle's configuration, of any version."""
    try:
        table = json.loads(read_small(folder, CONFIG))
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(table, dict) and table.get("format") == FORMAT


def _table(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a table, but is {str(value)[:40]!r}")
    return dict(value)


def _names(content: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = content.get(name)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"`{name}` must be a list of names, but is {str(value)[:40]!r}")
    return tuple(value)


def read_small(folder: Path, name: str) -> bytes:
    """Read a small file of a bundle.

    Raises:
        ValueError: if it is missing, or larger than allowed.
    """
    path = folder / name
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"`{folder}` {what}. Name a folder that `nmt-moe export` wrote.")
    if not path.is_file():
        advice = "Name a folder that `nmt-moe export` wrote." if name == CONFIG else EXPORT_AGAIN
        raise ValueError(f"`{folder}` has no `{name}`, so it is not a complete bundle. {advice}")
    size = path.stat().st_size
    if size > MAX_BYTES.get(name, 2**30):
        raise ValueError(f"`{path}` has {size} bytes, which is too many. {EXPORT_AGAIN}")
    return path.read_bytes()


def read_sums(folder: Path) -> dict[str, str]:
    """Read `SHA256SUMS`.

    Returns:
        The SHA-256 hash of each file, in hexadecimal.

    Raises:
        ValueError: if it is missing or malformed, or names a file that is missing.
    """
    path = folder / SUMS
    sums = {}
    for row in read_small(folder, SUMS).decode("utf-8", "replace").removesuffix("\n").split("\n"):
        found = ROW.fullmatch(row)
        if found is None:
            raise ValueError(f"`{path}` contains the malformed line {row[:80]!r}. {EXPORT_AGAIN}")
        sums[found[2]] = found[1]
        if not (folder / found[2]).is_file():
            raise ValueError(f"`{folder}` has no `{found[2]}`. {EXPORT_AGAIN}")
    for name in (CONFIG, VOCABULARY, WEIGHTS):
        if name not in sums:
            raise ValueError(f"`{path}` does not list `{name}`. {EXPORT_AGAIN}")
    return sums


def check_content(folder: Path, name: str, sums: Mapping[str, str], content: bytes) -> None:
    """Reject the contents of a file if their SHA-256 hash differs from the listed hash.

    Raises:
        ValueError: if it differs; the message names the file.
    """
    _compare(folder / name, sums, hashlib.sha256(content).hexdigest())


def check_file(folder: Path, name: str, sums: Mapping[str, str]) -> None:
    """Reject a file if its SHA-256 hash differs from the listed hash.

    Raises:
        ValueError: if it differs; the message names the file.
    """
    _compare(folder / name, sums, compute_sha256(folder / name))


def _compare(path: Path, sums: Mapping[str, str], digest: str) -> None:
    if path.name not in sums:
        raise ValueError(f"`{path.parent / SUMS}` does not list `{path.name}`. {EXPORT_AGAIN}")
    if sums[path.name] != digest:
        raise ValueError(
            f"`{path}` was altered: its SHA-256 hash differs from that in {SUMS}. {EXPORT_AGAIN}"
        )
