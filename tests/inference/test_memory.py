"""Experts that receive no tokens are never read from their files."""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nmt_moe import LanguageModel
from nmt_moe.inference import Pieces, export
from tests.support.bundles import LM, MOE, make_checkpoint

NUM_EXPERTS = 32
# An expert takes up 2 MB, which is the most that the system maps at a time. All 32 experts take up
# 64 MB.
WIDE = replace(MOE, model_dim=256, hidden_dim=1024, num_experts=NUM_EXPERTS, top_k=1)


def mapped(folder: Path) -> int:
    """Return how many bytes of the expert files are in this process's memory."""
    total, is_counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *words = line.split()
        if not first.endswith(":"):  # this line begins the entry of a mapping
            is_counted = f"{folder}/experts." in line
        elif first == "Rss:" and is_counted:
            total += 1024 * int(words[0])
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scoring_one_line_reads_only_a_few_of_many_experts(tmp_path: Path):
    config = replace(LM, model_dim=256, lstm_hidden_dim=256, moe=WIDE)
    path, data, pieces, _ = make_checkpoint(tmp_path, config)
    folder = tmp_path / "bundle"
    export(path, data, Pieces(pieces), folder)
    path.unlink()
    gc.collect()  # verification has also mapped the file
    size = (folder / "experts.decoder.safetensors").stat().st_size
    assert size > NUM_EXPERTS * 2**21
    model = LanguageModel.load(folder)
    loaded = mapped(folder)
    assert loaded < 0.1 * size
    [score] = model.score("cat")
    assert len(score.log_probs) <= 4  # each token uses one expert
    assert loaded < mapped(folder) < 0.6 * size
