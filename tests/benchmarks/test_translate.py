import json
import shlex
from types import SimpleNamespace

import pytest
from fairseq import tasks

from benchmarks import translate

FLAGS = "--model-dim 8 --lstm-hidden-dim 16 --expert-hidden-dim 8 --num-experts 4 --moe-top-k 2"
TINY = shlex.split(
    "--sentences 4 --batch 2 --beam 2 --length 4 --vocab-size 12 --rounds 2 --threads 1"
)
NAMES = ["lstm_moe_gnmt_small/recurrent", "lstm_moe_gnmt_small/parallel", "lstm"]


def test_the_table_has_a_row_for_each_model(capsys, tmp_path):
    path = tmp_path / "found.json"
    translate.main([*TINY, "--model-flags", FLAGS, "--json", str(path)])
    table, note = capsys.readouterr().out.strip().split("\n\n")
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    assert head == translate.COLUMNS
    assert [row[0] for row in rows] == NAMES
    assert rows[-1][-1] == "1.00"
    assert "beam 2" in note
    found = json.loads(path.read_text())["rows"]
    for row in found:
        assert len(row["seconds"]) == 2
        # For 4 sentences, two batches take 5 steps each: 4 tokens and the end mark.
        steps_per_second = 1 / row["seconds_per_step"]
        assert row["sentences_per_second"] * 10 / 4 == pytest.approx(steps_per_second)


def test_fairseqs_lstm_gets_the_widths_of_the_other_models(tmp_path):
    args = SimpleNamespace(
        arch="lstm_moe_gnmt_small",
        attention_wiring=["parallel"],
        model_flags="--encoder-layers 4 --decoder-layers 3",
        peer_hidden=None,
        vocab_size=12,
        sentences=2,
        length=4,
    )
    translate.write_corpus(tmp_path, args)
    config = translate.training_configs(tmp_path, args)["lstm"]
    model = tasks.setup_task(config.task).build_model(config.model)
    assert model.encoder.embed_tokens.embedding_dim == 256
    assert model.encoder.lstm.hidden_size == 512
    # Like the other encoders, this encoder has three levels: a bidirectional pair of LSTMs and two
    # layers above it.
    assert model.encoder.lstm.num_layers == 3
    assert len(model.decoder.layers) == 3
    assert model.decoder.fc_out.in_features == 256
