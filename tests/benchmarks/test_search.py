import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from fairseq import tasks

from benchmarks import search, translate

FLAGS = "--model-dim 8 --lstm-hidden-dim 16 --expert-hidden-dim 8 --num-experts 4 --moe-top-k 2"
NAMES = ["stock", "penalties", "pruning", "penalties, pruning"]


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Write a random model with confident predictions and its data; return the flags for both."""
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
    translate.save_checkpoint(tmp_path / "model.pt", config, model)
    # A random model does not end its sentences.
    short = {name: [*flags, "--max-len-b", "8"] for name, flags in search.SEARCHES.items()}
    monkeypatch.setattr(search, "SEARCHES", short)
    flags = f"--checkpoint {tmp_path}/model.pt --data {tmp_path} --subset test"
    return shlex.split(f"{flags} --batch 3 --beam 4 --rounds 2 --threads 1")


def test_the_table_has_a_row_for_each_search(line, capsys, tmp_path):
    path = tmp_path / "found.json"
    search.main([*line, "--json", str(path)])
    table, note = capsys.readouterr().out.strip().split("\n\n")
    head, _, *rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()
    ]
    assert head == search.COLUMNS
    assert [row[0] for row in rows] == NAMES
    assert "beam 4" in note
    stock, _, pruning, _ = found = json.loads(path.read_text())["rows"]
    assert all(len(row["seconds"]) == 2 and 0 <= row["same"] <= 1 for row in found)
    assert (stock["same"], stock["time_over_stock"]) == (1, 1)
    assert stock["rows"] % 4 == 0
    assert pruning["rows"] / pruning["steps"] < stock["rows"] / stock["steps"]


def test_what_is_counted_is_what_the_decoder_evaluates(line):
    args = search.parse(line)
    data = search.Data(args)
    job = search.Search(data, search.generation_config(args, search.SEARCHES["pruning"]))
    job.count()
    rows = []
    network = data.model.decoder.network
    network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    job()
    assert (len(rows), sum(rows)) == (job.num_steps, job.num_rows)
    assert sorted(job.best) == sorted(data.targets) == list(range(5))


def test_a_missing_checkpoint_is_refused_by_name(line):
    with pytest.raises(SystemExit, match="--checkpoint: nowhere.pt does not exist. Train a model"):
        search.main([*line, "--checkpoint", "nowhere.pt"])
