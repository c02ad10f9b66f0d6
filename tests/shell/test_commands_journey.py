"""The plugin works in real commands, in separate processes and from any folder."""

from pathlib import Path

import pytest

from tests.support.commands import PLUGIN, Output, call, run
from tests.support.corpus import preprocess_flags
from tests.support.training import BALANCE_KEYS, TINY_MOE, TRANSLATE, load

PLUGGED = ["--user-dir", PLUGIN]


@pytest.fixture(scope="module")
def scratch(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run fairseq-preprocess and fairseq-train in a new folder, and return it."""
    folder = tmp_path_factory.mktemp("journey")
    flags = preprocess_flags(corpus, Path("data"))
    done = run("preprocess", *flags, "--joined-dictionary", cwd=folder, is_installed=True)
    assert done.status == 0, done.text
    done = train(folder, 2, is_installed=True)
    (folder / "train.log").write_text(done.text)
    return folder


def train(folder: Path, epochs: int, is_installed: bool = False) -> Output:
    flags = ["--max-epoch", epochs, "--log-interval", 2, "--tensorboard-logdir", "curves"]
    command = ["data", *PLUGGED, *TINY_MOE, *flags]
    done = run("train", *command, cwd=folder, is_installed=is_installed)
    assert done.status == 0, done.text
    return done


def translate(command: str, folder: Path, stdin: bytes = b"", is_installed: bool = False) -> Output:
    model = ["--path", "checkpoints/checkpoint2.pt", "--beam", 3]
    arguments = ["data", *PLUGGED, *model, *TRANSLATE]
    done = run(command, *arguments, cwd=folder, stdin=stdin, is_installed=is_installed)
    assert done.status == 0, done.text
    return done


@pytest.fixture(scope="module")
def generated(scratch: Path) -> Output:
    return translate("generate", scratch, is_installed=True)


def test_training_logs_the_balance_overall_and_for_every_layer(scratch: Path):
    records = Output(0, (scratch / "train.log").read_text()).records()
    for prefix in ("", "train_", "valid_"):
        wanted = {prefix + key for key in (*BALANCE_KEYS, "nll_loss", "ppl")}
        rows = [row for row in records if f"{prefix}nll_loss" in row]
        assert rows, prefix
        assert all(wanted <= row.keys() for row in rows), prefix
    assert all("balance_loss" in row for row in records if "nll_loss" in row)
    assert records[-1]["train_nll_loss"] < records[0]["nll_loss"]


def test_tensorboard_shows_the_balance(scratch: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for split in ("train", "train_inner", "valid"):
        events = accumulator.EventAccumulator(str(scratch / "curves" / split)).Reload()
        assert BALANCE_KEYS | {"nll_loss"} <= set(events.Tags()["scalars"]), split


def test_generate_translates_the_test_set(generated: Output, corpus: Path):
    targets = [row[-1] for _, row in sorted(generated.lines("T").items())]
    assert targets == (corpus / "test.bb").read_text().splitlines()
    assert len(generated.hypotheses()) == len(targets)
    assert "BLEU" in generated.text


def test_interactive_translates_like_generate(scratch: Path, corpus: Path, generated: Output):
    spoken = translate("interactive", scratch, stdin=(corpus / "test.aa").read_bytes())
    assert spoken.hypotheses() == generated.hypotheses()


def test_a_second_start_continues_where_the_first_stopped(scratch: Path):
    done = train(scratch, 3)
    assert "Loaded checkpoint checkpoints/checkpoint_last.pt (epoch 3 @ 12 updates)" in done.text
    assert [row["epoch"] for row in done.records() if "train_loss" in row] == [3.0]
    assert load(scratch / "checkpoints/checkpoint3.pt")["model"].keys()


def test_validate_repeats_the_loss_of_training(data: Path, checkpoint: Path):
    # fairseq-validate requires the task, but reads its options from the checkpoint.
    flags = ["--task", "translation", "--path", checkpoint, "--log-format", "json", "--cpu"]
    done = call("validate", data, *flags, "--batch-size", 16, "--num-workers", 0)
    trained = load(checkpoint)["extra_state"]["val_loss"]
    assert done.records()[-1]["valid_loss"] == pytest.approx(trained)
