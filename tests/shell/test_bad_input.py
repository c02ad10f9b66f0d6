"""A command with bad input prints one message and leaves existing files unchanged."""

import shutil
from pathlib import Path
from unittest import mock

import pytest
from fairseq.models import MODEL_REGISTRY

from nmt_moe.compat.errors import explain
from tests.support.commands import PLUGIN, call, run
from tests.support.corpus import preprocess_flags, write_corpus, write_lines
from tests.support.training import TINY_MOE, TRANSLATE, without_updates

# The fixture's checkpoint was trained for 8 epochs.
SOON = ["--max-epoch", 20, "--no-epoch-checkpoints"]


def put(folder: Path, name: str, number: int, line: str) -> None:
    """Replace line `number` (from 1) of a corpus file."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    lines[number - 1] = line
    write_lines(folder / name, lines)


def preprocess(folder: Path, *flags: object) -> str:
    """Binarise a corpus into its subfolder `data`."""
    joined = [*preprocess_flags(folder, folder / "data"), "--joined-dictionary"]
    return call("preprocess", *joined, *flags).text


@pytest.fixture
def own_corpus(tmp_path: Path) -> Path:
    """Write a copy of the corpus that a test may damage."""
    return write_corpus(tmp_path / "corpus")


# Sentences


def test_an_empty_line_is_trained_on_and_translated_with_the_others(
    own_corpus: Path, tmp_path: Path
):
    put(own_corpus, "train.aa", 3, "")
    put(own_corpus, "train.bb", 5, "")
    put(own_corpus, "test.aa", 2, "")
    preprocess(own_corpus)
    data, few = own_corpus / "data", ["--max-update", 6, "--log-interval", 1]
    done = call("train", data, *TINY_MOE, *few, "--save-dir", tmp_path)
    assert [row["num_updates"] for row in done.records() if "loss" in row] == [1, 2, 3, 4, 5, 6]
    done = call("generate", data, "--path", tmp_path / "checkpoint_last.pt", *TRANSLATE)
    assert len(done.hypotheses()) == 8


LONG = " ".join(["ba"] * 5000)


def test_a_line_of_5000_tokens_is_left_out_of_training_and_its_number_is_printed(
    own_corpus: Path, tmp_path: Path
):
    put(own_corpus, "train.aa", 3, LONG)
    preprocess(own_corpus)
    flags = [*TINY_MOE, "--max-update", 6, "--save-dir", tmp_path]
    done = call("train", own_corpus / "data", *flags)
    # fairseq counts sentences from 0.
    assert "1 samples have invalid sizes and will be skipped" in done.text
    assert "first few sample ids=[2]" in done.text


def test_for_a_line_of_5000_tokens_in_a_test_set_the_message_names_the_option_that_leaves_it_out(
    own_corpus: Path, data: Path, checkpoint: Path
):
    put(own_corpus, "test.aa", 3, LONG)
    preprocess(own_corpus, "--srcdict", data / "dict.aa.txt")
    flags = ["--path", checkpoint, *TRANSLATE]
    with pytest.raises(Exception, match=r"#2 .*5001.*--skip-invalid-size-inputs-valid-test"):
        call("generate", own_corpus / "data", *flags)
    done = call("generate", own_corpus / "data", *flags, "--skip-invalid-size-inputs-valid-test")
    assert len(done.hypotheses()) == 7


def test_if_no_pair_of_a_corpus_fits_the_message_names_the_options(data: Path, tmp_path: Path):
    match = (
        r"Each sample in `train` must have at most 1 source and 1024 target tokens, but none does "
        r"\(96 in total\)\. "
        r"The longest, #\d+ .*, has \d+ source and \d+ target tokens\. .*--max-source-pos"
    )
    with pytest.raises(ValueError, match=match):
        call("train", data, *TINY_MOE, "--max-source-positions", 1, "--save-dir", tmp_path)


def test_a_test_set_that_is_skipped_entirely_is_named(
    own_corpus: Path, data: Path, checkpoint: Path
):
    write_lines(own_corpus / "test.aa", [LONG] * 8)
    preprocess(own_corpus, "--srcdict", data / "dict.aa.txt")
    flags = ["--path", checkpoint, *TRANSLATE, "--skip-invalid-size-inputs-valid-test"]
    with pytest.raises(ValueError, match=r"sample in `test` must have at most 1024 source.* 5001"):
        call("generate", own_corpus / "data", *flags)


def test_validation_sentences_longer_than_a_batch_are_refused_before_the_first_update(
    data: Path, tmp_path: Path
):
    match = r"must have at most 2 tokens.*--max-tokens-valid"
    with without_updates(), pytest.raises(ValueError, match=match):
        call("train", data, *TINY_MOE, "--max-tokens-valid", 2, "--save-dir", tmp_path)


def test_a_bad_line_does_not_affect_other_translations(data: Path, checkpoint: Path):
    lines = [b"ba de", b"", LONG.encode(), b"\xff\xfe ba", "ba \u732b".encode(), b"ki"]
    lines.append("\u732b \u72ac".encode())
    flags = ["--path", checkpoint, *TRANSLATE, "--buffer-size", 4]
    done = call("interactive", data, *flags, stdin=b"\n".join(lines) + b"\n")
    assert done.lines("H").keys() == {0, 1, 4, 5, 6}
    for message in (
        "line 2 is empty, and so is its translation",
        "line 3 has 5001 tokens, more than the 1024 allowed: not translated",
        "line 4 is not valid UTF-8",
        "line 5 has tokens that are not in the dictionary: 1 of 3",
        "line 7 contains no words from the dictionary, so its translation is meaningless",
    ):
        assert message in done.text
    alone = call("interactive", data, *flags, stdin=b"ba de\nki\n").hypotheses()
    assert [row[-1] for number, row in done.lines("H").items() if number in (0, 5)] == alone


def test_unknown_words_are_counted_and_become_the_unknown_symbol(
    own_corpus: Path, data: Path, checkpoint: Path
):
    put(own_corpus, "test.aa", 1, "\u732b")
    text = preprocess(own_corpus, "--srcdict", data / "dict.aa.txt")
    assert f"{own_corpus}/test.aa: 8 sents" in text
    assert "replaced (by <unk>)" in text
    done = call("generate", own_corpus / "data", "--path", checkpoint, *TRANSLATE)
    assert done.lines("S")[0] == ["<unk>"]
    assert len(done.hypotheses()) == 8


def test_a_line_that_is_not_utf8_is_named_with_its_file(own_corpus: Path):
    path = own_corpus / "train.aa"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"ba \xff de\n", *lines[5:]]))
    with pytest.raises(ValueError, match=rf"{path}.*line 5.*UTF-8"):
        preprocess(own_corpus)


# Files


def test_sides_of_different_length_are_refused_before_anything_is_written(own_corpus: Path):
    write_lines(own_corpus / "train.bb", (own_corpus / "train.bb").read_text().splitlines()[:-1])
    match = r"same number of lines, but `.*train\.aa` has 96 and `.*train\.bb` has 95"
    with pytest.raises(ValueError, match=match):
        preprocess(own_corpus)
    assert not list((own_corpus / "data").glob("*.*t"))


def test_a_missing_text_is_named(own_corpus: Path):
    (own_corpus / "valid.bb").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.bb"):
        preprocess(own_corpus)


@pytest.mark.parametrize("name", ["dict.aa.txt", "train.aa-bb.bb.bin"])
def test_a_missing_file_of_the_data_is_named(name: str, data: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / name).unlink()
    stem = name.removesuffix(".bb.bin").split(".")[0]
    with pytest.raises(FileNotFoundError, match=rf"{stem}.*{tmp_path}/data|{tmp_path}/data/{name}"):
        call("train", tmp_path / "data", *TINY_MOE, "--save-dir", tmp_path)


def test_missing_data_are_named(tmp_path: Path):
    languages = ["-s", "aa", "-t", "bb"]
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
        call("train", tmp_path / "nowhere", *languages, *TINY_MOE, "--save-dir", tmp_path)


@pytest.mark.parametrize("command", ["generate", "interactive"])
def test_a_missing_checkpoint_is_named(command: str, data: Path, tmp_path: Path):
    with pytest.raises(OSError, match=str(tmp_path / "none.pt")):
        call(command, data, "--path", tmp_path / "none.pt", *TRANSLATE)


# Checkpoints


def test_from_pretrained_names_a_wrong_folder(data: Path, checkpoint: Path):
    load = MODEL_REGISTRY["lstm_moe_gnmt"].from_pretrained
    names = {"checkpoint_file": checkpoint.name, "data_name_or_path": str(data)}
    assert load(str(checkpoint.parent), **names).translate("ba de")
    before = checkpoint.read_bytes()
    for path, changed, message in [
        ("/nowhere", {}, "`/nowhere` must be a folder, but "),
        (str(checkpoint), {}, "must be a folder, but is a file.*`checkpoint_file=`"),
        (str(checkpoint.parent), {"data_name_or_path": "/none"}, "`/none` must be a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(path, **names | changed)
    assert checkpoint.read_bytes() == before


SIZES = r"is \(48, 16\), not \(72, 16\)"  # fairseq pads dictionaries to multiples of 8


def test_for_a_dictionary_larger_than_the_checkpoints_the_message_names_both_sizes(
    own_corpus: Path, checkpoint: Path
):
    put(own_corpus, "train.aa", 1, " ".join(f"new{number}" for number in range(24)))
    preprocess(own_corpus)
    with pytest.raises(ValueError, match=rf"{checkpoint}.*{SIZES}.*dictionar"):
        call("generate", own_corpus / "data", "--path", checkpoint, *TRANSLATE)


def test_another_dictionary_of_the_same_size_is_noticed(own_corpus: Path, checkpoint: Path):
    for split in ("train", "valid", "test"):
        text = (own_corpus / f"{split}.aa").read_text()
        (own_corpus / f"{split}.aa").write_text(text.replace("ba", "new"))
    preprocess(own_corpus)
    with pytest.raises(ValueError, match=rf"{checkpoint}.*dictionary of 48 symbols is not"):
        call("generate", own_corpus / "data", "--path", checkpoint, *TRANSLATE)


def test_training_does_not_continue_with_another_dictionary(
    own_corpus: Path, checkpoint: Path, tmp_path: Path
):
    put(own_corpus, "train.aa", 1, "new words")
    preprocess(own_corpus)
    path = shutil.copy(checkpoint, tmp_path / "checkpoint_last.pt")
    with pytest.raises(Exception, match=str(path)) as caught:
        call("train", own_corpus / "data", *TINY_MOE, *SOON, "--save-dir", tmp_path)
    assert "dictionary of 48 symbols is not the one" in str(caught.value)
    assert path.read_bytes() == checkpoint.read_bytes()


def test_untied_weights_are_not_tied_silently(data: Path, checkpoint: Path, tmp_path: Path):
    flags = ["--finetune-from-model", checkpoint, "--share-decoder-input-output-embed"]
    with without_updates(), pytest.raises(Exception, match="Cannot load") as caught:
        call("train", data, *TINY_MOE, *SOON, *flags, "--save-dir", tmp_path)
    message = explain(caught.value)
    assert "two values for `encoder.network.embedding.weight` and `decoder.output" in message


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def corrupt(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(byte ^ 255 for byte in content[middle:][:64])
        + content[middle + 64 :]
    )


@pytest.mark.parametrize("damage", [truncate, corrupt])
@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_damaged_checkpoint_is_named_and_left_as_it_is(
    command: str, damage: object, data: Path, checkpoint: Path, tmp_path: Path
):
    path = tmp_path / "checkpoint_last.pt"
    content = damage(checkpoint.read_bytes())
    path.write_bytes(content)
    flags = {
        "train": [*TINY_MOE, *SOON, "--save-dir", tmp_path],
        "generate": ["--path", path, *TRANSLATE],
    }
    with pytest.raises(ValueError, match=rf"{path}.*truncated or corrupted"):
        call(command, data, *flags[command])
    assert path.read_bytes() == content


def test_a_loss_that_becomes_nan_stops_training_and_keeps_the_checkpoints(
    data: Path, checkpoint: Path, tmp_path: Path
):
    path = shutil.copy(checkpoint, tmp_path / "checkpoint_last.pt")
    flags = [*TINY_MOE, *SOON, "--save-dir", tmp_path]
    with pytest.raises(FloatingPointError, match="NaN.*lower|gradients are Nan/Inf"):
        call("train", data, *flags, "--lr", 1e30, "--clip-norm", 0)
    assert path.read_bytes() == checkpoint.read_bytes()
    call("train", data, *flags, "--max-epoch", 9)


# Options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moe-top-k", 5], "`top_k` must be from 1 to 4, but is 5"),
        (["--moe-top-k", 0], "`top_k` must be from 1 to 4, but is 0"),
        (["--num-experts", 0], "`num_experts` must be at least 1, but is 0"),
        (["--expert-hidden-dim", 0], "`hidden_dim` must be at least 1, but is 0"),
        (["--moe-groups", 3], "`num_experts` must be a multiple of `num_groups`, 3, but is 4"),
        (["--importance-loss-weight", -1], "`importance_weight` must be at least 0"),
        (["--model-dim", 0], "`model_dim` must be at least 1, but is 0"),
        (["--encoder-layers", 2], "`encoder_layers` must be at least 3, but is 2"),
        (["--dropout", 1.5], "`dropout` must be from 0.0 to 1.0, but is 1.5"),
        (["--warmup-updates", -1], "`--warmup-updates` must be at least 0, but is -1"),
    ],
)
def test_an_impossible_option_is_named(
    flags: list[object], message: str, data: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        call("train", data, *TINY_MOE, *flags, "--save-dir", tmp_path)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    "flags", [["--moe-gate", "none"], ["--attention", "dot"], ["--attention-wiring", "no"]]
)
def test_an_unknown_choice_is_refused(
    flags: list[str], data: Path, capfd: pytest.CaptureFixture, tmp_path: Path
):
    with pytest.raises(SystemExit) as caught:
        call("train", data, *TINY_MOE, *flags, "--save-dir", tmp_path)
    assert caught.value.code == 2


def test_a_wrong_user_dir_is_named(data: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "plugin")):
        call("train", data, "--user-dir", tmp_path / "plugin", *TINY_MOE)


def test_if_user_dir_is_forgotten_the_unknown_model_is_named(data: Path, tmp_path: Path):
    done = run("train", data, "--arch", "lstm_moe_gnmt", cwd=tmp_path)
    assert done.status == 2
    assert "invalid choice: 'lstm_moe_gnmt'" in done.text


def test_a_command_ends_in_one_message_and_not_in_a_traceback(data: Path, tmp_path: Path):
    flags = ["--user-dir", PLUGIN, *TINY_MOE, "--moe-top-k", 5]
    done = run("train", data, *flags, cwd=tmp_path)
    assert done.status == 1
    assert "fairseq-train: error: `top_k` must be from 1 to 4, but is 5." in done.text
    assert "Traceback" not in done.text


# fairseq-interactive


def test_a_blank_source_has_a_blank_translation(own_corpus: Path, data: Path, checkpoint: Path):
    flags = ["--path", checkpoint, *TRANSLATE, "--nbest", 2, "--print-alignment"]
    done = call("interactive", data, *flags, "--buffer-size", 9, stdin=b"ba de\n \n\nki\n")
    assert [number for number, row in done.lines("H").items() if row[-1] == ""] == [1, 2]
    put(own_corpus, "test.aa", 3, "")
    preprocess(own_corpus, "--srcdict", data / "dict.aa.txt")
    assert call("generate", own_corpus / "data", *flags).lines("H")[2][-1] == ""


def test_a_line_that_interactive_cannot_use_is_named_and_uses_no_memory(
    data: Path, checkpoint: Path
):
    lines = [b"\xef\xbb\xbfba", b"ba\rde", b"ba \x00", b"ba " * 2_000_000, b"</s> ba", b"ki\r\n"]
    done = call("interactive", data, "--path", checkpoint, *TRANSLATE, stdin=b"\n".join(lines))
    assert {number: row[0] for number, row in done.lines("S").items()} == {
        0: "ba",
        4: "<unk> ba",
        5: "ki",
    }
    for message in (
        "`standard input` begins with a byte order mark",
        "line 2 contains a carriage return (byte 3): not translated",
        "line 3 contains the control character U+0000 (byte 4): not translated",
        "line 4 has more than 1048576 bytes: not translated",
        "line 5 has tokens that are not in the dictionary: 1 of 3",
    ):
        assert message in done.text


def test_constraints_with_unknown_words_are_left_out(data: Path, checkpoint: Path):
    flags = ["--path", checkpoint, *TRANSLATE, "--constraints"]
    lines = b"ba de\tnew\tab\tab </s>\t<unk>\nba de\tab\n"
    done = call("interactive", data, *flags, stdin=lines)
    assert [row.split("\t")[1] for row in done.text.splitlines() if row[:2] == "C-"] == ["ab"] * 2
    assert "<unk>" not in "".join(done.hypotheses())
    assert "ab" in done.hypotheses()[1]
    for constraint in ("new", "ab </s>", "<unk>"):
        assert f"line 1 has the constraint '{constraint}' with unknown words" in done.text


def test_memory_does_not_grow_with_the_number_of_lines_translated(data: Path, checkpoint: Path):
    from fairseq.tasks.translation import TranslationTask

    kept = []
    with mock.patch.object(TranslationTask, "inference_step", autospec=True) as step:
        step.side_effect = lambda task, *_, **__: kept.append(task.dataset_to_epoch_iter) or [[]]
        call("interactive", data, "--path", checkpoint, *TRANSLATE, stdin=b"ba\n" * 5)
    assert len(kept) == 5
    assert not kept[0]
