"""The capacity recipe: equal costs, the choice of dropout, a run on a tiny text, and errors."""

import json
import re

import pytest
from click.testing import CliRunner

pytest.importorskip("fairseq")

from recipes.capacity import capacity, split_text
from tests.support.lm_text import write_text
from tests.support.recipes import run_script

TINY = {
    **{"VOCAB_SIZE": 28, "VALID_LINES": 20, "MODELS": "moe_16", "DROPOUTS": "0.1"},
    **{"SEEDS": "1", "DIM": 8, "UPDATES": 2, "MAX_TOKENS": 100, "WARMUP_UPDATES": 1},
    **{"DEVICE": "cpu"},
}


def run(**variables):
    return run_script("capacity/run.sh", **(TINY | variables))


def test_all_models_cost_the_same_and_differ_in_size():
    # At D = 64, an LSTM has 8 x 64 x 64 = 32,768 weights, and an expert has 2 x 64 x 128 = 16,384.
    # Each model uses 131,072 weights, in 4 LSTMs or in 2 LSTMs and 4 experts. A flat gate adds
    # 2 x 64 weights for each expert, and a gate with two levels adds 2 x 64 x 16 x (1 + 2), with 32
    # instead of 16 for 1024 experts. An LSTM has 4 x 64 biases.
    found = {
        name: {"0.0": {"seed-1": capacity.Result(2.0, 2.0)}} for name in capacity.model_options(64)
    }
    rows = capacity.make_rows(found, 64, 2000)
    gates = {"moe_4": 512, "moe_16": 2048, "moe_64": 8192, "moe_256h": 6144}
    gates["moe_1024h"] = 2 * 64 * 32 * (1 + 2)
    assert {row.name: row.ops for row in rows if row.name != "moe_1_wide"} == {
        name: 131_072 + gates.get(name, 0) for name in found if name != "moe_1_wide"
    }
    sizes = {row.name: row.params for row in rows}
    assert sizes["moe_16"] == 2 * 32_768 + 16 * 16_384 + 2048 + 2 * 256
    # With two levels, every group has a secondary gate.
    assert sizes["moe_256h"] == 2 * 32_768 + 256 * 16_384 + 2048 + 16 * 2048 + 2 * 256


def make_results(**valid):
    return {seed: capacity.Result(value, 9.0) for seed, value in valid.items()}


def test_dropout_is_chosen_only_on_valid():
    results = {"0.0": make_results(a=10.0, b=20.0), "0.1": make_results(a=14.0, b=15.0)}
    results["0.0"]["a"] = capacity.Result(10.0, 1.0)
    assert capacity.choose_dropout(results) == "0.1"


def test_dropout_is_chosen_on_the_common_seeds():
    results = {"0.0": make_results(a=10.0, b=20.0), "0.1": make_results(a=14.0)}
    assert capacity.choose_dropout(results) == "0.0"
    with pytest.raises(ValueError, match=r"0\.0, 0\.1 of a model have no seed in common"):
        capacity.choose_dropout({"0.0": make_results(a=1.0), "0.1": make_results(b=1.0)})


def write_log(run_folder, valid_bits, test_bits):
    run_folder.mkdir(parents=True)
    entries = [
        {f"{split}_nll_loss": str(bits), f"{split}_num_updates": "2"}
        for split, bits in (("valid", valid_bits), ("test", test_bits))
    ]
    text = "".join(f"2026-01-01 | INFO | x | {json.dumps(entry)}\n" for entry in entries)
    (run_folder / "train.log").write_text("noise {\n" + text)
    (run_folder / "done").touch()


def write_test_text(work):
    """Write a text of two lines with 6 pieces and 2 end marks, 4 words and 16 characters."""
    for folder, text in (("text", "abcd abcd\nabc abc"), ("pieces", "_ab cd _abcd\n_abc _a bc")):
        (work / folder).mkdir()
        (work / folder / "test").write_text(text + "\n")


def test_table_and_figure_of_given_logs(tmp_path):
    pytest.importorskip("matplotlib")
    runs = tmp_path / "runs"
    write_log(runs / "lstm_4/dropout-0.0/seed-1", 5, 4)
    write_log(runs / "moe_4/dropout-0.0/seed-1", 4, 3)
    write_log(runs / "moe_4/dropout-0.0/seed-2", 4, 2)
    write_log(runs / "moe_4/dropout-0.1/seed-1", 6, 1)
    (runs / "moe_16/dropout-0.0/seed-1").mkdir(parents=True)  # not finished
    (runs / "moe_16/dropout-0.0/seed-1/train.log").touch()
    write_test_text(tmp_path)
    report = ["report", "--work", tmp_path, "--dim", 64, "--vocab-size", 2000]
    done = CliRunner().invoke(capacity.main, [str(word) for word in report])
    assert done.exit_code == 0, done.output
    table = done.stdout.splitlines()
    assert table[2:] == [
        "| lstm_4 | 131,072 | 132,096 | 0.0 | 1 | 32.00 | 16.00 | 256.0 | 2.000 |",
        "| moe_4 | 131,584 | 132,096 | 0.0 | 2 | 16.00 (16.00 to 16.00) | 6.00 (4.00 to 8.00) "
        "| 40.0 | 1.250 |",
    ]
    assert (tmp_path / "table.md").read_text().splitlines() == table
    for figure in ("capacity.png", "updates.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", ["eos", "none"])
def test_from_text_to_table(tmp_path, mode):
    pytest.importorskip("matplotlib")
    variables = {"TEXT_DIR": write_text(tmp_path / "text"), "WORK": tmp_path / "work"}
    variables |= {"BREAK_MODE": mode, "BLOCK_SIZE": "8"}
    done = run(**variables)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "work/table.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == ["| moe_16"]
    assert (tmp_path / "work/updates.png").is_file()
    # A finished run is not repeated.
    again = run(**variables)
    assert again.stdout.count("seed 1: already done") == 1
    # An interrupted run continues from its last checkpoint.
    trained = tmp_path / "work/runs/moe_16/dropout-0.1/seed-1"
    (trained / "done").unlink()
    again = run(**variables)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Loaded checkpoint" in (trained / "train.log").read_text()
    other = run(**variables, UPDATES=3)
    assert other.returncode == 1
    assert "was trained with different settings or a different text" in other.stderr


def test_valid_is_the_end_of_train_and_blank_lines_are_left_out(tmp_path):
    (tmp_path / "train").write_bytes(b"a b\n\nc\n d  e \nf\n")
    (tmp_path / "test").write_bytes(b"g\n")
    words = split_text.split_text(
        [tmp_path / "train"], None, tmp_path / "test", 2, tmp_path / "out"
    )
    assert words == {"train": 5, "valid": 5, "test": 2}
    texts = [(tmp_path / "out" / name).read_text() for name in words]
    assert texts == ["a b\nc\n", "d e\nf\n", "g\n"]


def test_several_texts_are_trained_on_and_valid_may_be_a_separate_text(tmp_path):
    texts = {name: tmp_path / name for name in ("one", "two", "valid", "test")}
    for name, path in texts.items():
        path.write_text(f"{name}\n")
    one, two, valid, test = texts.values()
    words = split_text.split_text([one, two], valid, test, 5000, tmp_path / "out")
    assert words == {"train": 4, "valid": 2, "test": 2}
    written = [(tmp_path / "out" / name).read_text() for name in words]
    assert written == ["one\ntwo\n", "valid\n", "test\n"]


BAD_TEXTS = [
    pytest.param(b"", ": the text is empty", id="empty"),
    pytest.param(b"\n \n", ": the text is empty", id="blank"),
    pytest.param(b"a\nb \xff\n", "`, line 2 is not valid UTF-8 (byte 0xff", id="no-utf-8"),
    pytest.param(
        b"a\n" + b"b " * 5000,
        ": line 2 must have at most 3000 words, but it has 5000",
        id="endless",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS)
def test_a_bad_text_is_named(text, message, tmp_path):
    folder = write_text(tmp_path / "text")
    (folder / "train.en").write_bytes(text)  # before train.en.gz
    done = run(TEXT_DIR=folder, WORK=tmp_path / "work")
    assert done.returncode == 1
    assert f"{folder}/train.en{message}" in done.stderr


def test_a_text_that_is_cut_off_or_missing_is_named(tmp_path):
    folder = write_text(tmp_path / "text")
    packed = folder / "train.en.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train\.en\.gz` is not a complete compressed file"):
        split_text.read_sentences(packed)
    with pytest.raises(ValueError, match=r"has no test, test\.gz or test\.xz"):
        split_text.find_text(folder, "test")
    with pytest.raises(ValueError, match=r"TEXT_DIR=.*/none is not a folder"):
        split_text.find_text(tmp_path / "none", "test")


def test_a_text_shorter_than_valid_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"a\nb\n")
    with pytest.raises(ValueError, match="more than VALID_LINES = 2 lines, but has 2"):
        split_text.split_text([tmp_path / "text"], None, tmp_path / "text", 2, tmp_path / "out")


def test_without_a_finished_run_there_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="has no finished training"):
        capacity.collect(tmp_path)


REFUSALS = [
    pytest.param({"TEXT_DIR": ""}, "TEXT_DIR must name the folder"),
    pytest.param({"MODELS": "moe_5"}, "MODELS must be among lstm_4, .*, but contains 'moe_5'"),
    pytest.param({"DROPOUTS": "0.1 1"}, "DROPOUT must be at least 0 and below 1, but is '1'"),
    pytest.param({"SEEDS": "a"}, "SEED must be a whole number of at least 0, but is 'a'"),
    pytest.param({"SEEDS": " "}, "MODELS, DROPOUTS and SEEDS must not be empty"),
    pytest.param({"BREAK_MODE": "line"}, "BREAK_MODE must be one of eos, none, but is 'line'"),
    pytest.param({"UPDATES": "0"}, "UPDATES must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("variables", "message"), REFUSALS)
def test_a_wrong_variable_is_named(variables, message, tmp_path):
    done = run(**({"TEXT_DIR": tmp_path, "WORK": tmp_path / "work"} | variables))
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
