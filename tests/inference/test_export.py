"""All kinds of checkpoint can be exported; mismatched input is refused and leaves no files."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nmt_moe import LanguageModel, Translator
from nmt_moe.checkpoints import EXPERT_NAMES, load_checkpoint
from nmt_moe.checkpoints.average import average_checkpoints
from nmt_moe.checkpoints.reshape import split
from nmt_moe.inference import DTYPES, Description, Pieces, SearchDefaults, TextPipeline, export
from nmt_moe.text import pieces as lib
from nmt_moe.text.digests import compute_sha256
from tests.support.bundles import (
    GNMT,
    LM,
    MOE,
    make_checkpoint,
    make_data,
    make_networks,
    make_state,
)

DESCRIPTION = Description(search=SearchDefaults(max_len_b=8))
TEXTS = ["the big dog sees a red tree", "cat"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a bundle."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        prefix = "" if path.name == "model.safetensors" else path.name.split(".")[1] + "."
        found |= {prefix + name: value for name, value in load_file(path).items()}
    return found


def edit(path: Path, change: Any) -> None:
    """Change a checkpoint's contents."""
    state = load_checkpoint(path)
    change(state)
    torch.save(state, path)


def test_weights_are_those_of_the_checkpoint(tmp_path: Path):
    path, data, pieces, networks = make_checkpoint(tmp_path)
    summary = export(path, data, Pieces(pieces), tmp_path / "out", description=DESCRIPTION)
    assert "complete: translation `lstm_moe_gnmt`, float32, 6 experts per layer" in summary
    stored = weights(tmp_path / "out")
    for side in ("encoder", "decoder"):
        for name, value in networks[side].state_dict().items():
            if "noise_weight" in name:  # only training reads it
                assert not any("noise" in one for one in stored)
            elif ".experts." in name:
                assert torch.equal(stored[f"{side}.{name.split('.')[-1]}"], value.mT)
            else:
                assert torch.equal(stored[f"{side}.{name}"], value), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["languages"] == ["aa", "bb"]
    assert config["search"]["max_len_b"] == 8


def test_experts_in_separate_files_are_exported_too(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)

    def name_experts(state: dict[str, Any]) -> None:
        names = [name for name in state["model"] if ".experts." in name]
        state["extra_state"] = {EXPERT_NAMES: dict(enumerate(names))}

    edit(path, name_experts)
    parts = tmp_path / "parts" / "checkpoint.pt"
    parts.parent.mkdir()
    split(path, parts, 3)
    assert len(list(parts.parent.glob("experts-*.pt"))) == 3
    for name, source in (("whole", path), ("parts", parts)):
        export(source, data, Pieces(pieces), tmp_path / f"out-{name}")
    one, other = weights(tmp_path / "out-whole"), weights(tmp_path / "out-parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    next(parts.parent.glob("experts-*.pt")).unlink()
    with pytest.raises(ValueError, match="experts-"):
        export(parts, data, Pieces(pieces), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_an_averaged_checkpoint_is_exported(tmp_path: Path):
    path, data, pieces, networks = make_checkpoint(tmp_path / "one")
    other, _, _, others = make_checkpoint(tmp_path / "two", seed=2)
    average_checkpoints([path, other], tmp_path / "average.pt")
    export(tmp_path / "average.pt", data, Pieces(pieces), tmp_path / "out")
    mean = (networks["output"].weight + others["output"].weight) / 2
    assert torch.equal(weights(tmp_path / "out")["decoder.output.weight"], mean)


def test_a_multilingual_checkpoint_names_its_languages_itself(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path, languages="aa bb cc")
    export(path, data, Pieces(pieces), tmp_path / "out", description=DESCRIPTION)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["languages"] == ["aa", "bb", "cc"]
    assert len(config["directions"]) == 6
    assert Translator.load(tmp_path / "out").languages == ("aa", "bb", "cc")
    named = replace(DESCRIPTION, languages=("aa", "bb"))
    with pytest.raises(ValueError, match="must be left out for a multilingual model"):
        export(path, data, Pieces(pieces), tmp_path / "named", description=named)


def test_a_language_model_is_exported(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path, LM)
    named = replace(DESCRIPTION, languages=("en",))
    export(path, data, Pieces(pieces), tmp_path / "out", description=named)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["kind"], config["languages"]) == ("language_model", ["en"])
    assert len(LanguageModel.load(tmp_path / "out").score(TEXTS)) == 2


def test_options_of_version_0_1_0_are_read(tmp_path: Path):
    config = replace(GNMT, moe=replace(MOE, num_experts=8, num_groups=4, top_k=2))
    path, data, pieces, _ = make_checkpoint(tmp_path, config)
    export(path, data, Pieces(pieces), tmp_path / "new")
    early = {
        "top_k": "moe_top_k",
        "hidden_dim": "expert_hidden_dim",
        "recompute": "expert_recompute",
        "gate": "moe_gate",
        "num_groups": "moe_groups",
        "importance_weight": "importance_loss_weight",
        "load_weight": "load_loss_weight",
    }

    def rename(state: dict[str, Any]) -> None:
        options = state["cfg"]["model"]
        for name, old in early.items():
            options[old] = options.pop(name)

    edit(path, rename)
    export(path, data, Pieces(pieces), tmp_path / "old")
    new, old = ((tmp_path / name / "config.json").read_text() for name in ("new", "old"))
    assert json.loads(new)["network"] == json.loads(old)["network"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_joined", [False, True])
def test_tied_embeddings_are_stored_once(is_joined: bool, dtype: str, tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    output = "decoder.output.weight"

    def tie(state: dict[str, Any]) -> None:
        model = state["model"]
        tables = [name for name in model if name.endswith("embedding.weight")]
        assert len(tables) == 2
        for name in tables if is_joined else [name for name in tables if "decoder" in name]:
            model[name] = model[output].clone()

    edit(path, tie)
    export(path, data, Pieces(pieces), tmp_path / "out", dtype, DESCRIPTION)
    first = "encoder.embedding.weight" if is_joined else "decoder.embedding.weight"
    stored = weights(tmp_path / "out")
    assert first in stored
    assert output not in stored
    shared = json.loads((tmp_path / "out/config.json").read_text())["shared_weights"]
    assert len(shared) == (2 if is_joined else 1)
    assert set(shared.values()) == {first}
    assert all(one.text for one in Translator.load(tmp_path / "out").translate(TEXTS))


def test_small_dtypes_make_small_files(tmp_path: Path):
    moe = replace(MOE, model_dim=128, hidden_dim=256, num_experts=8)
    config = replace(GNMT, model_dim=128, lstm_hidden_dim=256, moe=moe)
    path, data, pieces, _ = make_checkpoint(tmp_path, config)
    sizes = {}
    for dtype in DTYPES:
        folder = tmp_path / dtype
        export(path, data, Pieces(pieces), folder, dtype, DESCRIPTION)
        sizes[dtype] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert all(one.text for one in Translator.load(folder).translate(TEXTS))
    assert sizes["int8"] <= 0.3 * sizes["float32"]
    assert sizes["bfloat16"] <= 0.55 * sizes["float32"]


def assert_refused(match: str, path: Path, data: Path, pieces: Path | None, **options: Any) -> None:
    """Check that an export is refused with one message and leaves no files."""
    folder = path.parent
    there = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, OSError), match=match) as caught:
        export(path, data, Pieces(pieces), options.pop("output", folder / "out"), **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == there


def test_a_dictionary_that_was_not_used_in_training_is_refused(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    dictionary = data / "dict.bb.txt"
    rows = dictionary.read_text().splitlines()
    dictionary.write_text("\n".join(rows[:-1]) + "\n")
    assert_refused(
        "symbols, but the target dictionary has .* Name the `--data`", path, data, pieces
    )
    dictionary.write_text("\n".join([*rows[:-2], rows[-1], rows[-2]]) + "\n")
    assert_refused("the target dictionary is not the one", path, data, pieces)
    dictionary.write_text("\n".join([*rows[:-1], rows[0]]) + "\n")
    assert_refused("repeats a word", path, data, pieces)
    dictionary.write_text("")
    assert_refused("has no words", path, data, pieces)
    dictionary.unlink()
    assert_refused(r"dict.bb.txt` is missing. .*: dict.aa.txt", path, data, pieces)
    many, data, pieces, _ = make_checkpoint(tmp_path / "many", languages="aa bb")
    (data / "dict.aa.txt").write_text("\n".join(rows[::-1]) + "\n")
    assert_refused("is not the one that the checkpoint was trained with", many, data, pieces)


def test_pieces_that_were_not_used_in_training_are_refused(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    content = pieces.read_bytes()
    pieces.write_bytes(content[: len(content) // 2])
    advice = "With `--pieces`, name the model"
    assert_refused(f"is not a complete sentencepiece model. {advice}", path, data, pieces)
    pieces.write_bytes(b"")
    assert_refused(f"is not a complete sentencepiece model. {advice}", path, data, pieces)
    pieces.unlink()
    assert_refused("No such file", path, data, pieces)
    words = "".join(f"{chr(0x4E00 + n)}{chr(0x4E10 + n)} {chr(0x4E20 + n)}\n" for n in range(60))
    _, other = make_data(tmp_path / "other", "aa")
    (tmp_path / "words").write_text(words)
    lib.train([tmp_path / "words"], other, tmp_path / "words.dict", 100, hard_vocab_limit=False)
    assert_refused(f"does not fit the vocabulary: .* {advice}", path, data, other)


def test_a_bundle_without_the_pieces_of_its_dictionary_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    size = len((data / "dict.aa.txt").read_text().splitlines())

    def write_dictionaries(num_marked: int) -> None:
        words = [f"{'▁' * (number < num_marked)}{number} 1\n" for number in range(size)]
        for language in ("aa", "bb"):
            (data / f"dict.{language}.txt").write_text("".join(words))

    def drop_digests(state: dict[str, Any]) -> None:
        state["model"] = {n: v for n, v in state["model"].items() if not n.endswith("digest")}

    edit(path, drop_digests)
    write_dictionaries(1)
    export(path, data, Pieces(), tmp_path / "words")
    assert caplog.text == ""
    write_dictionaries(size // 4)
    export(path, data, Pieces(), tmp_path / "pieces")
    assert "contain ▁, as sentencepiece's do, but `--pieces` is missing" in caplog.text


def test_missing_data_and_unnamed_languages_are_refused(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    assert_refused("is not a folder. Name a folder", path, tmp_path / "none", pieces)
    assert_refused("is not a folder. Name a folder", path, pieces, pieces)
    edit(path, lambda state: state["cfg"]["task"].update(source_lang=None, target_lang=None))
    assert_refused("training text for 0 pairs. Add --source-lang", path, data, pieces)
    (data / "train.aa-bb.aa.idx").touch()
    export(path, data, Pieces(pieces), tmp_path / "found", description=DESCRIPTION)
    (data / "train.aa-cc.aa.idx").touch()
    assert_refused("training text for 2 pairs. Add --source-lang", path, data, pieces)
    half = replace(DESCRIPTION, languages=("aa",))
    assert_refused("must be set together", path, data, pieces, description=half)
    wrong = replace(DESCRIPTION, languages=("aa", "zz"))
    assert_refused("dict.zz.txt` is missing", path, data, pieces, description=wrong)
    named = replace(DESCRIPTION, languages=("aa", "bb"))
    export(path, data, Pieces(pieces), tmp_path / "named", description=named)


def test_only_a_bundle_is_replaced(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    output = tmp_path / "out"
    beside = tmp_path / "out.part"
    beside.mkdir()
    (beside / "mine").write_text("mine")
    export(path, data, Pieces(pieces), output, description=DESCRIPTION)
    assert (beside / "mine").read_text() == "mine"
    assert_refused("exists. Specify another output, or add `--overwrite`", path, data, pieces)
    export(path, data, Pieces(pieces), output, "int8", is_overwritten=True)
    assert json.loads((output / "config.json").read_text())["dtype"] == "int8"
    (output / "notes.txt").write_text("mine")
    again: dict[str, Any] = {"is_overwritten": True}
    assert_refused(
        "also contains `notes.txt`, which is not part of a bundle", path, data, pieces, **again
    )
    (output / "notes.txt").unlink()
    config = (output / "config.json").read_text()
    for content in ("{}", "[]", '{"format": "other"}', "nonsense", "[" * 100_000):
        (output / "config.json").write_text(content)
        assert_refused("is a folder, but not a bundle", path, data, pieces, **again)
    (output / "config.json").write_text(config)
    (output / "model.safetensors").write_bytes(b"damaged")
    export(path, data, Pieces(pieces), output, is_overwritten=True)
    (tmp_path / "link").symlink_to(output)
    for name in ("link", "spm.model"):
        taken = {"output": tmp_path / name, **again}
        assert_refused("is not a folder. Specify another output", path, data, pieces, **taken)
    (tmp_path / "empty").mkdir()
    export(path, data, Pieces(pieces), tmp_path / "empty", is_overwritten=True)
    export(path, data, Pieces(pieces), tmp_path / "new/folder/out")
    for bad in (Path(), Path("/"), tmp_path / "spm.model" / "out"):
        with pytest.raises((ValueError, OSError)):
            export(path, data, Pieces(pieces), bad, is_overwritten=True)


def test_a_failure_midway_leaves_no_files_and_keeps_existing_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    output = tmp_path / "out"
    export(path, data, Pieces(pieces), output)
    before = {file.name: file.read_bytes() for file in output.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    module = importlib.import_module("nmt_moe.inference.exporting")
    monkeypatch.setattr(module, "write_digests", fail)
    assert_refused("no space left", path, data, pieces, is_overwritten=True)
    assert_refused("no space left", path, data, pieces, output=tmp_path / "other")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    content = path.read_bytes()
    assert_refused("`dtype` must be one of", path, data, pieces, dtype="float16")

    edit(path, lambda state: state["cfg"].update(model={"_name": "transformer", "dropout": 0.1}))
    assert_refused("contains the model 'transformer', which is not one of", path, data, pieces)
    path.write_bytes(content)
    # fairseq's own LSTM has options with similar names.
    lstm = {"_name": "lstm", "encoder_layers": 3, "decoder_layers": 2, "dropout": 0.1}
    edit(path, lambda state: state["cfg"].update(model=lstm))
    assert_refused("contains the model 'lstm', which is not one of", path, data, pieces)
    for cut in (0, 100, len(content) // 2):
        path.write_bytes(content[:cut])
        assert_refused("fairseq checkpoint", path, data, pieces)
    path.write_bytes(content)
    edit(path, lambda state: state["cfg"]["model"].update(num_experts="six"))
    assert_refused("has an invalid configuration", path, data, pieces)
    path.write_bytes(content)
    edit(path, lambda state: state["cfg"]["model"].update(encoder_layers=4))
    assert_refused("does not fit its configuration", path, data, pieces)
    path.write_bytes(content)
    edit(path, lambda state: state["model"].pop("decoder.output.weight"))
    assert_refused("decoder.output.weight", path, data, pieces)
    path.write_bytes(content)
    edit(path, lambda state: state["model"]["decoder.output.weight"].fill_(float("nan")))
    assert_refused("NaN or infinities in", path, data, pieces)
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        export(path, data, Pieces(pieces), tmp_path / "out")


def test_the_card_says_where_the_model_comes_from(tmp_path: Path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    (data / "train.aa-bb.aa.bin").write_bytes(b"text")

    def train(state: dict[str, Any]) -> None:
        state["cfg"]["optimizer"] = {"_name": "adam", "adam_betas": "(0.9, 0.98)"}
        state["cfg"]["optimization"] = {"lr": [0.002], "max_update": 3, "update_freq": [1]}
        state["cfg"]["dataset"] = {"max_tokens": 4096}
        state["cfg"]["criterion"] = {"_name": "moe_label_smoothed_cross_entropy"}

    edit(path, train)
    scores = "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0 = 38.1"
    text = TextPipeline(lowercase=True)
    described = replace(DESCRIPTION, scores=f"{scores}\n", text=text)
    export(path, data, Pieces(pieces), tmp_path / "out", "bfloat16", described)
    card = (tmp_path / "out/README.md").read_text()
    for name in ("dict.aa.txt", "dict.bb.txt", "train.aa-bb.aa.bin"):
        file = data / name
        assert f"| `{name}` | {file.stat().st_size} | `{compute_sha256(file)}` |" in card
    assert f"`checkpoint.pt`, sha256 `{compute_sha256(path)}`" in card
    assert scores in card
    for row in (
        "| weights | bfloat16 |",
        "| languages | aa, bb |",
        "| updates | 3 |",
        "| seed | 7 |",
    ):
        assert row in card
    [command] = re.findall(r"^fairseq-train .*$", card, re.MULTILINE)
    for words in (
        "fairseq-train data --user-dir nmt_moe",
        "--task translation",
        "--arch lstm_moe_gnmt",
        "--criterion moe_label_smoothed_cross_entropy",
        "--optimizer adam --adam-betas '(0.9, 0.98)'",
        "--num-experts 6",
        "--seed 7",
        "--max-tokens 4096",
        "--lr 0.002",
    ):
        assert words in command
    export(path, data, Pieces(pieces), tmp_path / "plain")
    assert "No scores were given" in (tmp_path / "plain/README.md").read_text()


def test_checkpoints_without_digests_of_their_dictionaries_are_exported(tmp_path: Path):
    data, pieces = make_data(tmp_path, "aa", "bb")
    symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    rows = (data / "dict.aa.txt").read_text().splitlines()
    symbols += [row.rpartition(" ")[0] for row in rows]
    task = {"_name": "translation", "source_lang": "aa", "target_lang": "bb"}
    state = make_state(GNMT, make_networks(GNMT, len(symbols)), symbols, task, {})
    state["model"] = {n: v for n, v in state["model"].items() if not n.endswith("digest")}
    torch.save(state, tmp_path / "early.pt")
    assert "complete" in export(tmp_path / "early.pt", data, Pieces(pieces), tmp_path / "out")
