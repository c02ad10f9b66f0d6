"""Language models are preprocessed, trained, resumed and evaluated; unusable input is refused."""

import math
import re
import shutil
from pathlib import Path

import pytest

from tests.support.commands import PLUGIN, REPOSITORY, Output, call, run
from tests.support.corpus import write_lines
from tests.support.language_model import (
    EVALUATE,
    TEXT,
    TINY_LM,
    UPDATES,
    preprocess_flags,
    write_text,
)
from tests.support.training import assert_same_bits, load, without_updates

BALANCE_KEYS = {
    f"{layer}moe_{key}"
    for layer in ("", "decoder_")
    for key in ("cv_importance", "cv_load", "max_load")
}
SAMPLED = ["--sampled-softmax", 8]


@pytest.fixture(scope="module")
def unbroken(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for 4 epochs of 5 updates without interruption, and return the run's folder."""
    folder = tmp_path_factory.mktemp("unbroken")
    return train(text_data, folder, "--max-epoch", 4, *SAMPLED, "--save-interval-updates", 7)


def train(data: Path, folder: Path, *flags: object) -> Path:
    done = call("train", data, *TINY_LM, *flags, "--log-interval", 1, "--save-dir", folder)
    (folder / "train.log").write_text(done.text)
    return folder


def records(folder: Path, column: str) -> list[dict[str, float]]:
    return [row for row in Output(0, (folder / "train.log").read_text()).records() if column in row]


def evaluate(data: Path, checkpoint: Path, *flags: object) -> tuple[int, float]:
    """Return the number of tokens and the perplexity that fairseq-eval-lm prints."""
    done = call("eval_lm", data, *EVALUATE, "--path", checkpoint, *flags)
    tokens = re.search(r"Evaluated ([\d,]+) tokens", done.text)
    loss = re.search(r"Loss \(base 2\): ([\d.]+)", done.text)
    return int(tokens[1].replace(",", "")), 2 ** float(loss[1])


def test_training_learns_and_logs_the_balance(unbroken: Path):
    rows = records(unbroken, "nll_loss")
    assert [row["num_updates"] for row in rows] == list(range(1, 21))
    assert all(BALANCE_KEYS | {"balance_loss", "ppl"} <= row.keys() for row in rows)
    # The log marks estimates as such. Validation computes exact values.
    assert all(row["sampled_softmax"] == 8 for row in rows)
    assert [row["train_sampled_softmax"] for row in records(unbroken, "train_nll_loss")] == [8] * 4
    valid = records(unbroken, "valid_nll_loss")
    assert "valid_sampled_softmax" not in valid[-1]
    assert valid[-1]["valid_nll_loss"] < valid[0]["valid_nll_loss"]
    assert {f"valid_{key}" for key in BALANCE_KEYS} <= valid[-1].keys()


def test_two_epochs_and_two_more_give_the_same_bits_as_four(
    text_data: Path, unbroken: Path, tmp_path: Path
):
    train(text_data, tmp_path, "--max-epoch", 2, *SAMPLED)
    train(text_data, tmp_path, "--max-epoch", 4, *SAMPLED)
    assert_same_training(unbroken, tmp_path)


def test_training_killed_within_an_epoch_resumes_with_the_same_bits(
    text_data: Path, unbroken: Path, tmp_path: Path
):
    # Update 7 is the second of the five in epoch 2.
    shutil.copy(unbroken / "checkpoint_2_7.pt", tmp_path / "checkpoint_last.pt")
    train(text_data, tmp_path, "--max-epoch", 4, *SAMPLED)
    assert_same_training(unbroken, tmp_path)


def assert_same_training(expected: Path, actual: Path) -> None:
    one, other = (load(folder / "checkpoint_last.pt") for folder in (expected, actual))
    assert one["optimizer_history"][-1]["num_updates"] == 20
    for part in ("model", "last_optimizer_state"):
        assert_same_bits(one[part], other[part], part)
    assert one["extra_state"]["val_loss"] == other["extra_state"]["val_loss"]


def test_eval_lm_gives_the_perplexity_of_validation_over_all_words_and_end_marks(
    text_data: Path, unbroken: Path
):
    flags = ["--gen-subset", "valid", "--sample-break-mode", "eos"]
    tokens, perplexity = evaluate(text_data, unbroken / "checkpoint_last.pt", *flags)
    lines = (text_data.parent / "text/valid").read_text().splitlines()
    assert tokens == sum(len(line.split()) + 1 for line in lines)
    bits = records(unbroken, "valid_nll_loss")[-1]["valid_nll_loss"]
    assert math.log2(perplexity) == pytest.approx(bits, abs=2e-3)
    # Results do not depend on the batch that a sentence is in.
    assert evaluate(text_data, unbroken / "checkpoint_last.pt", *flags, "--batch-size", 1) == (
        tokens,
        pytest.approx(perplexity, rel=1e-3),
    )


NO_BALANCE = ["--importance-weight", 0, "--load-weight", 0]


@pytest.mark.parametrize(
    "criterion",
    [
        ["--sampled-softmax", 0],
        ["--sampled-softmax", 8],
        ["--criterion", "cross_entropy", *NO_BALANCE],
    ],
)
def test_a_begin_mark_before_each_row_is_not_a_target(
    text_data: Path, tmp_path: Path, criterion: list[object]
):
    epochs = ["--max-epoch", 2, "--no-epoch-checkpoints"]
    train(text_data, tmp_path, "--add-bos-token", *epochs, *criterion)
    flags = ["--gen-subset", "valid", "--sample-break-mode", "eos", "--add-bos-token"]
    _, perplexity = evaluate(text_data, tmp_path / "checkpoint_last.pt", *flags)
    logged = records(tmp_path, "valid_ppl")[-1]["valid_ppl"]
    assert math.log2(perplexity) == pytest.approx(math.log2(logged), abs=2e-3)


def test_fairseqs_own_model_trains_with_the_criterion(text_data: Path, tmp_path: Path):
    widths = [f"--decoder-{name}=16" for name in ("embed-dim", "hidden-size", "out-embed-dim")]
    few = [*TEXT, *UPDATES, "--max-update", 1, "--no-save", "--save-dir", tmp_path]
    assert "valid_ppl" in call("train", text_data, "--arch", "lstm_lm", *widths, *few).text


def test_an_adaptive_softmax_needs_its_own_criterion(text_data: Path, tmp_path: Path):
    widths = [f"--decoder-{name}=16" for name in ("embed-dim", "ffn-embed-dim")]
    flags = [*widths, "--decoder-layers", 1, "--decoder-attention-heads", 2]
    flags += [*TEXT, *UPDATES, "--adaptive-softmax-cutoff", 8, "--save-dir", tmp_path]
    with pytest.raises(ValueError, match="`--criterion` must be adaptive_loss with"):
        call("train", text_data, "--arch", "transformer_lm", *flags)


def test_the_state_is_kept_between_the_sentences_of_a_block_and_reset_between_blocks(
    text_data: Path, unbroken: Path
):
    found = {
        mode: evaluate(
            text_data,
            unbroken / "checkpoint_last.pt",
            *["--gen-subset", "test", "--sample-break-mode", mode, "--tokens-per-sample", 1000],
        )
        for mode in ("eos", "none")
    }
    # In blocks, the same tokens are scored with more context.
    assert found["eos"][0] == found["none"][0]
    assert found["eos"][1] != pytest.approx(found["none"][1], rel=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--sample-break-mode", "none", "--tokens-per-sample", 20], id="blocks"),
        pytest.param(["--bf16", *SAMPLED], id="bf16"),
        pytest.param(["--memory-efficient-bf16"], id="memory-efficient-bf16"),
        pytest.param(["--fp16"], id="fp16"),
        pytest.param(["--amp", *SAMPLED], id="amp"),
        pytest.param(["--moe-groups", 2, "--moe-top-k", 1], id="groups"),
        pytest.param(["--update-freq", 2, *SAMPLED], id="accumulated"),
        pytest.param(["--output-dictionary-size", 12], id="shorter-output"),
        pytest.param(["--arch", "lstm_lm_4x512"], id="dense"),
        pytest.param(
            ["--arch", "lstm_moe_lm_1_deep", "--num-experts", 1, "--moe-top-k", 1], id="deep"
        ),
    ],
)
def test_a_variant_trains_and_is_evaluated(flags: list[object], text_data: Path, tmp_path: Path):
    train(text_data, tmp_path, *flags, "--max-epoch", 2, "--no-epoch-checkpoints")
    assert all(math.isfinite(row["loss"]) for row in records(tmp_path, "nll_loss"))
    # Compare validation losses, which are exact. Sampled losses fluctuate.
    first, last = (row["valid_nll_loss"] for row in records(tmp_path, "valid_nll_loss"))
    assert last < first
    output = flags if "--output-dictionary-size" in flags else []
    _, perplexity = evaluate(text_data, tmp_path / "checkpoint_last.pt", *output)
    assert 1 < perplexity < 20


# Bad input


def preprocess(folder: Path, split: str, content: bytes) -> Path:
    """Binarise a text in which one file has the given contents."""
    text = write_text(folder / "text")
    (text / split).write_bytes(content)
    call("preprocess", *preprocess_flags(text, folder / "data"))
    return folder / "data"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_empty_text_is_named(split: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"text/{split}` is empty"):
        preprocess(tmp_path, split, b"")
    data = preprocess(tmp_path, split, b"ba\n")
    (data / f"{split}.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"data/{split}\.bin` contains no sentences"):
        train(data, tmp_path, "--max-epoch", 1)


def test_a_text_that_is_not_utf8_is_named_with_file_and_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"text/train`, line 2 is not valid UTF-8"):
        preprocess(tmp_path, "train", b"w1 w2\nw3 \xff\n")


def test_the_documented_command_names_the_line_that_is_not_utf8(tmp_path: Path):
    page = REPOSITORY / "docs/language-models.md"
    printed = page.read_text(encoding="utf-8").replace("\\\n", "")
    commands = [line.split() for line in printed.splitlines() if "fairseq-preprocess -" in line]
    (words,) = (words for words in commands if "--only-source" in words)
    text = write_text(tmp_path / "text")
    (tmp_path / "nmt_moe").symlink_to(PLUGIN)  # the page's commands assume the repository's folder
    (text / "train").write_bytes(b"w1 w2\nw3 \xff\n")
    done = run("preprocess", *words[1:], cwd=tmp_path)
    assert done.status == 1
    assert "`text/train`, line 2 is not valid UTF-8" in done.text
    assert "Traceback" not in done.text
    (text / "train").write_bytes(b"w1 w2\nw3 w4\n")
    assert run("preprocess", *words[1:], cwd=tmp_path).status == 0
    assert (tmp_path / "text-bin" / "valid.bin").exists()


def test_a_line_of_66000_words_is_named_and_can_be_cut(tmp_path: Path):
    data = preprocess(tmp_path, "train", b"w1 w2 " * 33_000)
    with pytest.raises(ValueError, match=r"data/train`, line 1: .*65535.* has 66001.*none"):
        train(data, tmp_path, "--max-epoch", 1)
    blocks = ["--sample-break-mode", "none", "--tokens-per-sample", 64]
    train(data, tmp_path, *blocks, "--max-update", 2, "--disable-validation")
    assert len(records(tmp_path, "nll_loss")) == 2


def test_for_a_line_longer_than_a_batch_the_message_names_the_options(tmp_path: Path):
    data = preprocess(tmp_path, "valid", b"w1\n" + b"w2 " * 300 + b"\n")
    match = (
        r"sample #1 must have at most 100 tokens.* has 301.*--max-tokens-valid.*"
        r"--sample-break-mode none --tokens-per-sample 100\."
    )
    # The validation set is checked before the first update.
    with without_updates(), pytest.raises(ValueError, match=match):
        train(data, tmp_path, "--max-epoch", 1, "--max-tokens", 100)
    blocks = ["--sample-break-mode", "none", "--tokens-per-sample", 100]
    train(data, tmp_path, "--max-update", 1, "--max-tokens", 100, *blocks)


def test_for_blocks_larger_than_a_validation_batch_the_message_names_the_option(
    text_data: Path, tmp_path: Path
):
    flags = ["--sample-break-mode", "none", "--max-tokens", 4096, "--max-tokens-valid", 32]
    match = r"at most 32 tokens.*--sample-break-mode none --tokens-per-sample 32\."
    with without_updates(), pytest.raises(ValueError, match=match):
        train(text_data, tmp_path, *flags)


def test_if_no_line_of_a_text_fits_the_message_names_the_options(tmp_path: Path):
    data = preprocess(tmp_path, "train", b"w2 " * 9000 + b"\n")
    match = (
        r"sample in `train` must have at most 1000 tokens, but none does \(1 in total\)\. "
        r"The longest, #0 "
        r".* has 9001 tokens\..*--max-tokens.*--sample-break-mode none --tokens-per-sample 1000\."
    )
    with pytest.raises(ValueError, match=match):
        train(data, tmp_path, "--max-tokens", 1000)
    blocks = ["--sample-break-mode", "none", "--tokens-per-sample", 1000]
    train(data, tmp_path, "--max-tokens", 1000, *blocks, "--max-update", 1)


def test_more_samples_than_words_are_refused(text_data: Path, tmp_path: Path):
    match = r"`--sampled-softmax` must be from 0 to 16, the size of the dictionary, but is 17"
    with pytest.raises(ValueError, match=match):
        train(text_data, tmp_path, "--sampled-softmax", 17)


def test_more_experts_per_token_than_a_group_has_are_refused(text_data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="`top_k` must be from 1 to 2, but is 3"):
        train(text_data, tmp_path, "--moe-groups", 2, "--moe-top-k", 3)


def test_an_empty_line_is_a_sentence_with_only_an_end_mark(tmp_path: Path):
    text = write_text(tmp_path / "text")
    write_lines(text / "train", ["", *(text / "train").read_text().splitlines()])
    call("preprocess", *preprocess_flags(text, tmp_path / "data"))
    train(tmp_path / "data", tmp_path, "--max-update", 6, "--disable-validation")
    assert [row["num_updates"] for row in records(tmp_path, "nll_loss")] == [1, 2, 3, 4, 5, 6]
