"""The comparisons and counts of the translation benchmark, with a tiny random model."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import tasks

from benchmarks import inference, translate
from nmt_moe.inference import Pieces, export

FLAGS = "--model-dim 8 --lstm-hidden-dim 16 --expert-hidden-dim 8 --num-experts 4 --moe-top-k 2"


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """Return the flags for a model with confident predictions, its bundles and its data."""
    args = SimpleNamespace(
        arch="lstm_moe_gnmt_small",
        attention_wiring=["parallel"],
        model_flags=FLAGS,
        peer_hidden=None,
        vocab_size=12,
        sentences=5,
        length=6,
    )
    torch.manual_seed(1)
    translate.write_corpus(tmp_path, args)
    config = next(iter(translate.training_configs(tmp_path, args).values()))
    model = tasks.setup_task(config.task).build_model(config.model)
    model.decoder.output.weight.data *= 300
    checkpoint = tmp_path / "model.pt"
    translate.save_checkpoint(checkpoint, config, model)
    for dtype in ("float32", "int8"):
        export(checkpoint, tmp_path, Pieces(), tmp_path / dtype, dtype)
    flags = f"--data {tmp_path} --checkpoint {checkpoint} --bundles float32 int8"
    return shlex.split(f"{flags} --max-length 6 --batch 2 --one 2 --threads 1")


def test_all_translators_get_the_same_sentences(
    line: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(tmp_path)  # the bundles' paths are relative
    path = tmp_path / "found.json"
    inference.main([*line, "--interactive", "--rounds", "2", "--json", str(path)])
    rows = {(row["translator"], row["way"]): row for row in json.loads(path.read_text())["rows"]}
    names = ["fairseq", "nmt_moe, float32", "nmt_moe, int8"]
    ways = {(name, way): count for name in names for way, count in (("batch", 5), ("one", 2))}
    ways["fairseq-interactive", "one"] = 2
    assert {key: row["sentences"] for key, row in rows.items()} == ways
    assert all(len(row["seconds"]) == len(row["cpu"]) == 2 for row in rows.values())
    for name in ("fairseq", "fairseq-interactive", "nmt_moe, float32"):
        assert rows[name, "one"]["same"] == 1
        assert rows[name, "one"]["bleu"] == rows["fairseq", "one"]["bleu"]
    assert rows["fairseq", "batch"]["speed_up"] == 1
    shown = capsys.readouterr().out
    assert "Float32, batch: 100.0% of the translations equal fairseq's." in shown
    assert shown.count(" s, including torch's import; without it, in ") == 2
