"""Damaged, foreign and hostile bundles are refused with one message that gives advice."""

import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmt_moe import LanguageModel, Translator
from nmt_moe.inference import (
    Description,
    Pieces,
    SearchDefaults,
    export,
    open_bundle,
    verify_bundle,
)
from nmt_moe.text import pieces as lib
from nmt_moe.text.digests import write_digests
from tests.support.bundles import LM, make_bundle, make_checkpoint, make_data

TEXT = "the big dog sees a red tree under the house"
DESCRIPTION = Description(search=SearchDefaults(max_len_b=4))
FILES = [
    "README.md",
    "SHA256SUMS",
    "config.json",
    "experts.decoder.safetensors",
    "experts.encoder.safetensors",
    "model.safetensors",
    "pieces.model",
    "vocabulary.json",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("original"), description=DESCRIPTION)[0]


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def seal(folder: Path) -> None:
    """Rewrite the checksums, so that other checks must find the damage."""
    sums = folder / "SHA256SUMS"
    sums.unlink(missing_ok=True)
    write_digests(sums, sorted(path for path in folder.iterdir() if path.is_file()))


def assert_refused(open_it: Callable[[], Any], *words: str) -> None:
    """Check that a one-line error message names the fault and a remedy."""
    start = time.process_time()
    with pytest.raises(ValueError, match=".") as caught:
        open_it()
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "export" in message or "Name a" in message
    assert "\n" not in message
    assert len(message) < 700
    assert time.process_time() - start < 5


def assert_not_opened(folder: Path, *words: str) -> None:
    assert_refused(lambda: Translator.load(folder), *words)
    assert_refused(lambda: verify_bundle(folder), *words)


def test_a_complete_bundle_has_these_files_and_is_accepted(bundle: Path):
    assert sorted(path.name for path in bundle.iterdir()) == FILES
    summary = verify_bundle(bundle)
    assert "complete: translation `lstm_moe_gnmt`, float32, 6 experts per layer, 7 files" in summary
    (bundle / "notes.txt").write_text("mine")
    assert verify_bundle(bundle) == summary
    assert Translator.load(str(bundle)).translate(TEXT)[0].text


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Path, name: str):
    (bundle / name).unlink()
    assert_not_opened(bundle, f"`{bundle}` has no `{name}`")
    (bundle / name).symlink_to(bundle / "nothing")
    assert_not_opened(bundle, f"`{bundle}` has no `{name}`")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(bundle: Path, name: str, share: float):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: int(len(content) * share)])
    named = str(bundle) if name == "SHA256SUMS" else f"`{bundle / name}`"
    assert_refused(lambda: verify_bundle(bundle), named)
    if name != "README.md":  # no program reads it
        assert_refused(lambda: Translator.load(bundle), named)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(bundle: Path, name: str, share: float):
    flip(bundle / name, int((bundle / name).stat().st_size * share))
    sums = name == "SHA256SUMS"  # the message names the file with a different checksum
    assert_refused(lambda: verify_bundle(bundle), *([] if sums else [f"`{bundle / name}`"]))
    if name in ("config.json", "model.safetensors", "pieces.model", "vocabulary.json"):
        assert_refused(lambda: Translator.load(bundle), f"`{bundle / name}`")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_an_altered_expert_is_found_when_a_token_is_sent_to_it(bundle: Path, side: str):
    path = bundle / f"experts.{side}.safetensors"
    [sentence] = Translator.load(bundle).translate(TEXT, with_experts=True)[0].sentences
    pieces = sentence.experts if side == "encoder" else sentence.hypotheses[0].experts
    assert pieces is not None
    used = {expert for piece in pieces for expert, _ in piece}
    start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8:start])
    for expert in range(6):
        for name in ("weight_in", "weight_out"):
            first, last = header[name]["data_offsets"]
            position = start + first + (last - first) // 6 * expert + 5
            flip(path, position)
            assert_refused(lambda: verify_bundle(bundle), f"`{path}` was altered")
            seal(bundle)
            assert_refused(lambda: verify_bundle(bundle), f"`{path}`: expert {expert} was altered")
            translator = Translator.load(bundle)
            if expert in used:
                assert_refused(
                    lambda translator=translator: translator.translate(TEXT),
                    f"`{path}`: expert {expert} was altered",
                )
            flip(path, position)
    seal(bundle)
    assert "complete" in verify_bundle(bundle)


def test_a_folder_that_is_not_a_bundle_is_named(bundle: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert_not_opened(tmp_path / "empty", "has no `config.json`", "Name a folder")
    assert_not_opened(tmp_path / "nothing", f"`{tmp_path / 'nothing'}` does not exist")
    assert_not_opened(bundle / "config.json", "config.json` is a file")
    shutil.rmtree(bundle / "config.json", ignore_errors=True)
    (bundle / "config.json").unlink()
    (bundle / "config.json").mkdir()
    assert_not_opened(bundle, "has no `config.json`")


def test_links_to_a_bundle_and_within_it_are_followed(bundle: Path, tmp_path: Path):
    store = tmp_path / "store"
    store.mkdir()
    for path in list(bundle.iterdir()):
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
    (tmp_path / "link").symlink_to(bundle)
    assert "complete" in verify_bundle(tmp_path / "link")
    assert Translator.load(tmp_path / "link").translate(TEXT)[0].text
    flip(store / "model.safetensors", 2000)
    assert_not_opened(tmp_path / "link", "model.safetensors` was altered")
    (bundle / "config.json").unlink()
    (bundle / "config.json").symlink_to(bundle / "config.json")
    assert_not_opened(bundle, "has no `config.json`")


def edit_config(folder: Path, names: str, value: Any) -> None:
    """Set a value in config.json, or remove it if the value is `...`."""
    table = json.loads((folder / "config.json").read_text())
    *outer, last = names.split(".")
    inner = table
    for name in outer:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(table))
    seal(folder)


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.5, [1], True])
def test_another_format_version_is_refused(bundle: Path, version: Any):
    edit_config(bundle, "format_version", version)
    assert_not_opened(bundle, f"format version {version!r}", "reads 1. Install a newer version")


NOT_JSON = {
    "text": b"a text",
    "nothing": b"",
    "bytes": b"\xff\xfe\0",
    "deep lists": b"[" * 200_000,
    "deep tables": b'{"a":' * 100_000,
    "a long number": b"9" * 10_000,
    "half": b'{"format": "nmt_moe bundle"',
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("name", ["config.json", "vocabulary.json"])
def test_a_file_that_is_not_json_is_refused(bundle: Path, name: str, content: bytes):
    (bundle / name).write_bytes(content)
    seal(bundle)
    assert_not_opened(bundle, f"`{bundle / name}` is not JSON")


@pytest.mark.parametrize("content", ["[]", "5", "null", '"nmt_moe bundle"', '{"format": "other"}'])
def test_json_with_other_contents_is_refused(bundle: Path, content: str):
    (bundle / "config.json").write_text(content)
    seal(bundle)
    assert_not_opened(bundle, "is not the configuration of a bundle")


def test_a_configuration_is_not_read_beyond_its_size(bundle: Path):
    (bundle / "config.json").write_bytes(b" " * (2**20 + 1))
    assert_not_opened(bundle, "config.json` has 1048577 bytes, which is too many")


CONFIGS: list[tuple[str, Any]] = [
    ("network.moe.num_experts", 10**9),
    ("network.moe.num_experts", 5),
    ("network.moe.num_experts", 6.0),
    ("network.moe.num_experts", True),
    ("network.moe.num_experts", [6]),
    ("network.moe.num_experts", "6"),
    ("network.moe.num_experts", -6),
    ("network.moe.num_groups", 3),
    ("network.moe.top_k", 7),
    ("network.moe.top_k", None),
    ("network.moe.hidden_dim", 25),
    ("network.moe.hidden_dim", 10**15),
    ("network.moe.model_dim", 17),
    ("network.moe.gate", "other"),
    ("network.moe.gate", ["softmax"]),
    ("network.moe.gate", "strictly_balanced"),
    ("network.moe.extra", 1),
    ("network.moe", None),
    ("network.moe", 5),
    ("network.moe", []),
    ("network.encoder_layers", 10**6),
    ("network.encoder_layers", 10**18),
    ("network.encoder_layers", 4),
    ("network.encoder_layers", 3.0),
    ("network.decoder_layers", 10**6),
    ("network.decoder_layers", "2"),
    ("network.model_dim", 10**12),
    ("network.model_dim", 10**30),
    ("network.model_dim", 16.5),
    ("network.model_dim", 15),
    ("network.lstm_hidden_dim", 10**15),
    ("network.lstm_hidden_dim", 8),
    ("network.lstm_hidden_dim", None),
    ("network.attention", {}),
    ("network.attention_wiring", "parallel"),
    ("network.dropout", "0.4"),
    ("network.dropout", 2),
    ("network.extra", 1),
    ("network", None),
    ("network", "GNMT"),
    ("network", []),
    ("kind", "other"),
    ("kind", ["translation"]),
    ("kind", ...),
    ("dtype", "int8"),
    ("dtype", "float64"),
    ("dtype", ["float32"]),
    ("languages", "aa"),
    ("languages", [1, 2]),
    ("languages", None),
    ("languages", {"aa": 1}),
    ("directions", ["aa-bb"]),
    ("directions", 5),
    ("text.lowercase", "yes"),
    ("text.lowercase", 1),
    ("text.max_source_pieces", 0),
    ("text.max_source_pieces", 1e9),
    ("text.extra", 0),
    ("text", ...),
    ("search.beam_size", 10**9),
    ("search.beam_size", 0),
    ("search.beam_size", "5"),
    ("search.length_exponent", "1"),
    ("search.length_exponent", float("nan")),
    ("search.length_penalty_alpha", -1),
    ("search.length_penalty_alpha", float("inf")),
    ("search.coverage_penalty_beta", [1]),
    ("search.beam_prune", None),
    ("search.max_len_a", float("nan")),
    ("search.max_len_a", {}),
    ("search.max_len_b", 0),
    ("search.max_len_b", 10**9),
    ("search", 5),
    ("has_pieces", "no"),
    ("has_pieces", 0),
    ("architecture", 5),
    ("shared_weights", ["a"]),
    ("shared_weights", {"decoder.output.weight": 5}),
    ("shared_weights", {"decoder.output.weight": "nothing"}),
    ("shared_weights", {"decoder.output.weight": "encoder.embedding.weight"}),
    ("shared_weights", None),
    ("extra", 1),
]


@pytest.mark.parametrize(
    ("names", "value"), CONFIGS, ids=[f"{names}={value}"[:60] for names, value in CONFIGS]
)
def test_an_impossible_configuration_is_refused_at_once(bundle: Path, names: str, value: Any):
    edit_config(bundle, names, value)
    assert_not_opened(bundle, str(bundle))


@pytest.mark.parametrize(
    "row",
    [
        "",
        "nonsense",
        "0" * 64 + "  ../config.json",
        "0" * 64 + "  /etc/hostname",
        "0" * 64 + "  ..",
    ],
)
def test_checksums_with_invalid_rows_are_refused(bundle: Path, row: str):
    with (bundle / "SHA256SUMS").open("a") as file:
        file.write(row + "\n")
    assert_not_opened(bundle, str(bundle))


def test_checksums_must_list_all_files_that_are_read(bundle: Path):
    rows = (bundle / "SHA256SUMS").read_text().splitlines(keepends=True)
    for name in FILES:
        left = [row for row in rows if name not in row]
        (bundle / "SHA256SUMS").write_text("".join(left))
        if len(left) < len(rows) and name != "README.md":
            assert_not_opened(bundle, "source.model" if name == "pieces.model" else name)
    (bundle / "SHA256SUMS").write_bytes(b"\xff\n")
    assert_not_opened(bundle, "SHA256SUMS")


def write_header(path: Path, header: dict[str, Any], length: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)


@pytest.mark.parametrize("name", ["model.safetensors", "experts.encoder.safetensors"])
def test_a_header_that_claims_too_much_is_refused(bundle: Path, name: str):
    path = bundle / name
    entry = {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}
    names = ["weight_in", "decoder.output.weight"]
    for header, length in [
        ({}, 2**60),
        ({}, 2**64 - 1),
        (dict.fromkeys(names, entry), None),
        ({one: {**entry, "data_offsets": [0, 4]} for one in names}, None),
        ({one: {**entry, "shape": [2**63, 2**63]} for one in names}, None),
        ({one: {**entry, "shape": [-1], "data_offsets": [0, 0]} for one in names}, None),
    ]:
        write_header(path, header, length)
        seal(bundle)
        assert_not_opened(bundle, f"`{path}` is not a complete safetensors file")


class Hostile:
    """An object that makes unpickling run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", FILES)
def test_nothing_in_a_file_is_executed(bundle: Path, name: str, tmp_path: Path):
    trace = tmp_path / "executed"
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Hostile(trace))),
        lambda path: torch.save(Hostile(trace), path),
    ):
        write(bundle / name)
        if name == "README.md":
            assert_refused(lambda: verify_bundle(bundle), "README.md` was altered")
            continue
        if name != "SHA256SUMS":
            seal(bundle)
        assert_not_opened(bundle, str(bundle))
    assert not trace.exists()


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    seal(path.parent)


OUTPUT = "decoder.output.weight"
WEIGHTS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "transposed": lambda t: t.update({OUTPUT: t[OUTPUT].t()}),
    "longer": lambda t: t.update({OUTPUT: torch.cat([t[OUTPUT], t[OUTPUT]])}),
    "no rows": lambda t: t.update({OUTPUT: t[OUTPUT][:0]}),
    "double": lambda t: t.update({OUTPUT: t[OUTPUT].double()}),
    "half": lambda t: t.update({OUTPUT: t[OUTPUT].half()}),
    "whole": lambda t: t.update({OUTPUT: t[OUTPUT].to(torch.int8)}),
    "flat": lambda t: t.update({OUTPUT: t[OUTPUT].flatten()}),
    "scalar": lambda t: t.update({OUTPUT: torch.tensor(1.0)}),
    "missing": lambda t: t.pop(OUTPUT),
    "more": lambda t: t.update({"decoder.other": torch.zeros(1)}),
    "empty": lambda t: t.clear(),
}


@pytest.mark.parametrize("edit", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit_are_named(bundle: Path, edit: Callable[[Any], Any]):
    path = bundle / "model.safetensors"
    edit_weights(path, edit)
    assert_not_opened(bundle, f"`{path}` does not fit its configuration: ")


EXPERTS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "fewer": lambda t: t.update({name: value[:5] for name, value in t.items()}),
    "double": lambda t: t.update({"weight_in": t["weight_in"].double()}),
    "transposed": lambda t: t.update({"weight_out": t["weight_out"].mT}),
    "no digest": lambda t: t.pop("sha256"),
    "short digest": lambda t: t.update({"sha256": t["sha256"][:, :16]}),
    "scales": lambda t: t.update({"weight_in.scale": torch.zeros(6, 24)}),
    "empty": lambda t: t.clear(),
}


@pytest.mark.parametrize("edit", EXPERTS.values(), ids=EXPERTS)
def test_experts_that_do_not_fit_are_named(bundle: Path, edit: Callable[[Any], Any]):
    path = bundle / "experts.decoder.safetensors"
    edit_weights(path, edit)
    assert_not_opened(bundle, f"`{path}` does not contain the experts of its configuration")


VOCABULARIES: dict[str, Callable[[list[str]], Any]] = {
    "no marks": lambda symbols: {"shared": symbols[4:]},
    "other marks": lambda symbols: {"shared": ["<pad>", "<s>", *symbols[2:]]},
    "fewer": lambda symbols: {"shared": symbols[:-1]},
    "more": lambda symbols: {"shared": [*symbols, "more"]},
    "numbers": lambda symbols: {"shared": [*symbols[:-1], 5]},
    "a surrogate": lambda symbols: {"shared": [*symbols[:-1], "\ud800"]},
    "a line end": lambda symbols: {"shared": [*symbols[:-1], "a\nb"]},
    "one side": lambda symbols: {"source": symbols},
    "text": lambda symbols: {"shared": "".join(symbols)},
    "a list": lambda symbols: symbols,
    "nothing": lambda symbols: None,
}


@pytest.mark.parametrize("edit", VOCABULARIES.values(), ids=VOCABULARIES)
def test_a_vocabulary_that_does_not_fit_is_refused(bundle: Path, edit: Callable[[Any], Any]):
    path = bundle / "vocabulary.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text())["shared"])))
    seal(bundle)
    assert_not_opened(bundle, str(bundle))


def test_the_last_entry_of_a_repeated_word_counts(bundle: Path):
    # fairseq does the same with `#fairseq:overwrite` in a dictionary. A repeated mark stays a mark.
    path = bundle / "vocabulary.json"
    symbols = json.loads(path.read_text())["shared"]
    symbols[-2:] = ["</s>", symbols[5]]
    path.write_text(json.dumps({"shared": symbols}))
    seal(bundle)
    vocabulary = open_bundle(bundle, "translation").vocabularies["source"]
    assert vocabulary.numbers(["</s>", symbols[5], symbols[6]]) == [3, len(symbols) - 1, 6]


def test_pieces_of_another_vocabulary_are_refused(bundle: Path, tmp_path: Path):
    other = tmp_path / "other"
    _, pieces = make_data(other, "aa")
    other_text = other / "text"
    other_text.write_text("".join(f"zwölf boxkämpfer jagen viktor {n}\n" for n in range(99)))
    lib.train([other_text], pieces, other / "dict", 40)
    (bundle / "pieces.model").write_bytes(pieces.read_bytes())
    seal(bundle)
    assert_not_opened(bundle, "pieces.model` does not fit the vocabulary")
    for content in (b"", b"nonsense", pieces.read_bytes()[:-100], b"\x0a" * 1000):
        (bundle / "pieces.model").write_bytes(content)
        seal(bundle)
        assert_not_opened(bundle, "pieces.model` is not a complete sentencepiece model")


def test_each_kind_of_bundle_names_its_class(bundle: Path, tmp_path: Path):
    folder, _ = make_bundle(tmp_path / "lm", LM)
    with pytest.raises(ValueError, match=r"is for `nmt_moe.LanguageModel`, not for"):
        Translator.load(folder)
    with pytest.raises(ValueError, match=r"is for `nmt_moe.Translator`, not for"):
        LanguageModel.load(bundle)
    assert "complete: language model `lstm_moe_lm`, float32" in verify_bundle(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_dtypes_are_verified_too(dtype: str, tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    folder = tmp_path / "small"
    export(path, data, Pieces(pieces), folder, dtype, DESCRIPTION)
    assert dtype in verify_bundle(folder)
    if dtype == "int8":
        edit_weights(folder / "model.safetensors", lambda t: t.pop(f"{OUTPUT}.scale"))
        assert_not_opened(folder, f"`{OUTPUT}.scale` must be ")
