"""Experts that no token is sent to are never read from their files."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nmt_moe import Translator
from nmt_moe.inference import Description, Pieces, SearchDefaults, export
from tests.support.bundles import GNMT, MOE, make_checkpoint

NUM_EXPERTS = 32
# An expert is 2 MB, as the pages are that the system maps at once; both layers are 128 MB.
WIDE = replace(MOE, model_dim=256, hidden_dim=1024, num_experts=NUM_EXPERTS, top_k=1)


def mapped(folder: Path) -> int:
    """Count the bytes of the files of experts that are in this process's memory."""
    total, is_counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *words = line.split()
        if not first.endswith(":"):  # the range of a file
            is_counted = f"{folder}/experts." in line
        elif first == "Rss:" and is_counted:
            total += 1024 * int(words[0])
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_sentence_reads_few_of_many_experts(tmp_path: Path):
    config = replace(GNMT, model_dim=256, lstm_hidden_dim=256, moe=WIDE)
    path, data, pieces, _ = make_checkpoint(tmp_path, config)
    folder = tmp_path / "bundle"
    short = Description(search=SearchDefaults(beam_size=1, max_len_b=2))
    export(path, data, Pieces(pieces), folder, description=short)
    path.unlink()
    size = sum(file.stat().st_size for file in folder.glob("experts.*"))
    assert size > 2 * NUM_EXPERTS * 2**21
    translator = Translator.load(folder)
    loaded = mapped(folder)
    assert loaded < 0.1 * size
    [sentence] = translator.translate("cat", with_experts=True)[0].sentences
    assert sentence.experts is not None
    assert len(sentence.experts) <= 3
    # With the end mark, at most 4 tokens of the source and 3 of the target, one expert each.
    assert loaded < mapped(folder) < 0.6 * size
