"""Models of every architecture, wiring, attention and precision can train and translate."""

import math
from pathlib import Path

import pytest

from tests.support.commands import Output, call
from tests.support.corpus import preprocess_flags
from tests.support.training import BALANCE_KEYS, EXPERTS, SIZES, TINY_MOE, TRANSLATE, UPDATES, load

WITHOUT_EXPERTS = [*SIZES, *UPDATES]
WITH_EXPERTS = [*SIZES, *EXPERTS, *UPDATES]
GROUPS = ["--moe-groups", 2, "--moe-top-k", 1]
VARIANTS = [
    pytest.param(["--arch", "lstm_gnmt", *WITHOUT_EXPERTS], id="dense"),
    pytest.param(["--arch", "lstm_moe_gnmt_small", *WITH_EXPERTS], id="small"),
    pytest.param(["--arch", "lstm_gnmt_small", *WITHOUT_EXPERTS], id="small-dense"),
    pytest.param([*TINY_MOE, "--attention", "additive"], id="additive"),
    pytest.param([*TINY_MOE, "--attention-wiring", "parallel"], id="parallel"),
    pytest.param(
        [*TINY_MOE, "--attention-wiring", "parallel", "--attention", "additive"],
        id="parallel-additive",
    ),
    pytest.param([*TINY_MOE, "--num-experts", 4, "--moe-top-k", 4], id="all-experts-at-once"),
    pytest.param([*TINY_MOE, "--moe-gate", "softmax"], id="softmax-gate"),
    pytest.param([*TINY_MOE, "--moe-gate", "strictly_balanced"], id="strict-balance"),
    pytest.param([*TINY_MOE, *GROUPS], id="groups"),
    pytest.param([*TINY_MOE, *GROUPS, "--moe-gate", "strictly_balanced"], id="strict-groups"),
    pytest.param([*TINY_MOE, "--encoder-layers", 4, "--decoder-layers", 3], id="deeper"),
    pytest.param([*TINY_MOE, "--share-decoder-input-output-embed"], id="tied"),
    # The option is on by default, and giving the flag turns it off.
    pytest.param([*TINY_MOE, "--left-pad-source"], id="padded-right"),
]


def train(data: Path, folder: Path, flags: list[object], updates: int = 3) -> list[dict]:
    """Train without validation, and return the log of each update."""
    few = ["--max-update", updates, "--log-interval", 1, "--disable-validation"]
    done = call("train", data, *flags, *few, "--no-epoch-checkpoints", "--save-dir", folder)
    return [row for row in done.records() if "nll_loss" in row]


def generate(data: Path, path: object, *flags: object) -> Output:
    return call("generate", data, "--path", path, *TRANSLATE, *flags)


@pytest.mark.parametrize("flags", VARIANTS)
def test_a_variant_trains_and_translates(flags: list[object], data: Path, tmp_path: Path):
    records = train(data, tmp_path, flags)
    assert [row["num_updates"] for row in records] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["gnorm"] > 0 for row in records)
    has_experts = "lstm_gnmt" not in flags
    assert all((row.keys() >= BALANCE_KEYS) == has_experts for row in records)
    done = generate(data, tmp_path / "checkpoint_last.pt", "--beam", 2)
    assert len(done.hypotheses()) == 8


def test_languages_with_separate_dictionaries_get_separate_embeddings(corpus: Path, tmp_path: Path):
    call("preprocess", *preprocess_flags(corpus, tmp_path / "data"))
    train(tmp_path / "data", tmp_path, TINY_MOE)
    done = generate(tmp_path / "data", tmp_path / "checkpoint_last.pt")
    assert len(done.hypotheses()) == 8
    state = load(tmp_path / "checkpoint_last.pt")["model"]
    embeddings = [state[f"{side}.network.embedding.weight"] for side in ("encoder", "decoder")]
    assert not embeddings[0].equal(embeddings[1])


PRECISIONS = [
    pytest.param(["--bf16"], id="bf16"),
    pytest.param(["--memory-efficient-bf16"], id="memory-efficient-bf16"),
    pytest.param(["--fp16"], id="fp16"),
    pytest.param(["--memory-efficient-fp16"], id="memory-efficient-fp16"),
    pytest.param(["--amp"], id="amp"),
    pytest.param(["--amp", "--bf16"], id="amp-bf16"),
]


@pytest.mark.parametrize("flags", PRECISIONS)
def test_a_model_trains_on_cpu_at_lower_precision(flags: list[object], data: Path, tmp_path: Path):
    records = train(data, tmp_path, [*TINY_MOE, *flags], updates=6)
    assert [row["num_updates"] for row in records] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(row["loss"]) for row in records)
    assert records[-1]["nll_loss"] < records[0]["nll_loss"]
    assert all(0 <= row["moe_cv_load"] < 2 for row in records)
    done = generate(data, tmp_path / "checkpoint_last.pt")
    assert len(done.hypotheses()) == 8


def test_a_model_in_fp16_translates_on_cpu(data: Path, checkpoint: Path):
    done = generate(data, checkpoint, "--fp16")
    assert len(done.hypotheses()) == 8
