import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nmt_moe.cli import main
from nmt_moe.scoring import logs, plots

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def run(*arguments):
    return CliRunner().invoke(main, ["plot", *map(str, arguments)])


def entry(**columns: float) -> str:
    """Return a log line like fairseq's, with a logger's prefix and numbers as text."""
    return "2026-01-01 | INFO | train | " + json.dumps({k: str(v) for k, v in columns.items()})


def train(update: int, **columns: float) -> str:
    return entry(epoch=1, num_updates=update, **columns)


LOG = [
    "2026-01-01 | INFO | fairseq_cli.train | {'_name': None, 'common': {}}",
    train(2, nll_loss=5.0, ppl=32.0, moe_cv_load=0.5, moe_max_load=2.0, moe_cv_importance=0.6),
    train(4, nll_loss=4.0, ppl=16.0, moe_cv_load=0.25, moe_max_load=1.5, moe_cv_importance=0.3),
    entry(epoch=1, valid_nll_loss=4.5, valid_ppl=22.6, valid_num_updates=4),
    entry(epoch=1, train_nll_loss=4.4, train_ppl=21.1, train_num_updates=4, train_gnorm="nan"),
    "some other line",
    '{"broken',
    "",
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "moe.log"
    path.write_text("\n".join(LOG))
    return path


def test_entries_are_read_by_split_and_update():
    read = logs.read_run("moe", LOG)
    assert read.curve(["train_inner.nll_loss"]) == ([2, 4], [5.0, 4.0])
    assert read.curve(["valid.ppl"]) == ([4], [22.6])
    assert read.curve(["train.nll_loss"]) == ([4], [4.4])
    assert read.curve(["train_inner.moe_max_load"]) == ([2, 4], [2.0, 1.5])
    # The first logged column is read, unknown columns are empty, and NaN is left out.
    assert read.curve(["nothing", "train.nll_loss"]) == ([4], [4.4])
    assert read.curve(["nothing"]) == ([], [])
    assert "train.gnorm" not in read.columns


def test_the_later_of_two_entries_for_an_update_counts():
    read = logs.read_run("resumed", [*LOG, train(4, nll_loss=3.5), train(3, nll_loss=4.2)])
    assert read.curve(["train_inner.nll_loss"]) == ([2, 3, 4], [5.0, 4.2, 3.5])


def test_runs_are_named_by_file_or_label(log: Path):
    labels = [one.label for one in logs.read_runs([str(log), f"32 experts={log}"])]
    assert labels == ["moe", "32 experts"]


def test_a_file_name_may_have_an_equals_sign(tmp_path: Path):
    path = tmp_path / "lr=1.log"
    path.write_text("\n".join(LOG))
    assert logs.read_runs([str(path)])[0].label == "lr=1"


def test_a_missing_file_and_one_without_entries_are_named(tmp_path: Path):
    (tmp_path / "plain.log").write_text("nothing here\n")
    flags = ["--output", tmp_path / "out.png"]
    done = run(*flags, tmp_path / "absent.log")
    assert done.exit_code == 1
    assert "absent.log" in done.stderr
    message = f"`{tmp_path}/plain.log` contains no entry from fairseq's `--log-format json`"
    assert message in run(*flags, tmp_path / "plain.log").stderr
    # The message is the same if a label is given.
    assert message in run(*flags, f"dense={tmp_path / 'plain.log'}").stderr
    assert str(tmp_path) in run(*flags, tmp_path).stderr


def test_files_of_the_same_name_are_distinguished_by_their_folders(tmp_path: Path):
    paths = [tmp_path / name for name in ("A/train.log", "B/train.log", "C/moe.log")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("\n".join(LOG))
    runs = logs.read_runs([*map(str, paths), f"mine={paths[0]}"])
    assert [one.label for one in runs] == ["A/train.log", "B/train.log", "moe", "mine"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/A/log/t.log", "/x/B/log/t.log"], ["A/log/t.log", "B/log/t.log"]),
        (["/x/t.log", "/x/t.json"], ["t.log", "t.json"]),
        (["/x/t.log", "/x/A/t.log", "/y/A/t.log"], ["x/t.log", "x/A/t.log", "y/A/t.log"]),
        (["/t.log", "/x/t.log"], ["/t.log", "x/t.log"]),
        (["/x/t.log", "/x/../x/t.log"], ["t", "t"]),
    ],
)
def test_names_are_only_as_long_as_necessary(paths: list[str], names: list[str]):
    assert list(logs.name_files([Path(path) for path in paths]).values()) == names


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path):
    output = tmp_path / "nodir" / "out.png"
    message = run("--output", output, tmp_path / "absent.log").stderr
    assert f"error: `{output}` must be in a folder that exists." in message
    assert f"Create `{output.parent}` first." in message


def test_without_matplotlib_the_message_says_how_to_get_it(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert "pip install 'nmt-moe[plot]'" in run("--output", tmp_path / "out.png", log).stderr
    assert not (tmp_path / "out.png").exists()


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_runs_are_drawn_even_if_one_lacks_columns(log: Path, tmp_path: Path):
    (tmp_path / "dense.log").write_text("\n".join([train(2, nll_loss=5.1), train(4, nll_loss=4.9)]))
    output = tmp_path / "out.png"
    assert run("--output", output, log, f"dense={tmp_path / 'dense.log'}").exit_code == 0
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_an_output_that_is_a_folder_ends_in_a_message(log: Path, tmp_path: Path):
    done = run("--output", tmp_path, log)
    assert done.exit_code == 1
    assert str(tmp_path) in done.stderr


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_an_estimated_training_loss_is_labelled():
    from matplotlib.figure import Figure

    marked = [train(2, nll_loss=5.0, sampled_softmax=500, moe_cv_load=0.5), LOG[3]]
    runs = [logs.read_run("sampled", marked), logs.read_run("full", LOG)]
    labels = []
    for name, columns in plots.PANELS:
        axes = Figure().subplots()
        plots.draw_panel(axes, name, columns, runs)
        labels.append(axes.get_legend_handles_labels()[1])
    loss, perplexity, _, load, _ = labels
    assert loss == ["sampled, training (estimate)", "sampled", "full"]
    assert perplexity == load == ["sampled", "full"]
