"""Checkpoints that fairseq cannot read are reported by name, and cannot run code."""

import os

import pytest
import torch

from tests.support.stock_model import (
    damage,
    load_with_fairseq,
)


def test_a_checkpoint_of_fairseq_loads_under_the_safe_loader(stock):
    load_with_fairseq(stock, "models/checkpoint_last.pt")


@pytest.mark.parametrize("kind", ["truncated", "changed", "empty", "text"])
def test_a_damaged_checkpoint_is_named(stock, kind):
    name = damage(stock, kind)
    with pytest.raises(
        ValueError, match=rf"{name}` \(\d+ bytes\) is not a complete fairseq checkp"
    ):
        load_with_fairseq(stock, name)


def test_a_torch_file_that_is_not_a_checkpoint_is_named(stock):
    torch.save({"weights": torch.ones(3)}, stock / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt` has no `model`"):
        load_with_fairseq(stock, "other.pt")


def test_a_checkpoint_that_would_run_code_is_refused(stock):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(stock / "sprung"),)

    torch.save({"cfg": Trap()}, stock / "trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt` contains a Python object .* could run code"):
        load_with_fairseq(stock, "trap.pt")
    assert not (stock / "sprung").exists()


def test_a_missing_checkpoint_keeps_its_own_message(stock):
    with pytest.raises(OSError, match=r"none\.pt: no such file|Model file not found: .*none\.pt"):
        load_with_fairseq(stock, "none.pt")


def test_a_checkpoint_of_an_unknown_model_asks_for_its_plugin(stock):
    state = torch.load(stock / "models/checkpoint_last.pt", weights_only=False)
    state["cfg"]["model"] = {"_name": "of_another_plugin"}
    torch.save(state, stock / "unknown.pt")
    with pytest.raises(ValueError, match=r"the model `of_another_plugin`, .*Add the --user-dir"):
        load_with_fairseq(stock, "unknown.pt")


def test_a_dictionary_that_does_not_fit_is_named_as_the_reason(stock):
    words = (stock / "bin/dict.aa.txt").read_text().splitlines(keepends=True)
    few = stock / "few"
    few.mkdir()
    (few / "dict.aa.txt").write_text("".join(words[:2]))
    (few / "dict.bb.txt").write_text("".join(words))
    message = r"encoder\.embed_tokens\.weight is \(\d+, 8\), not \(\d+, 8\).* dictionaries"
    with pytest.raises(ValueError, match=message):
        load_with_fairseq(stock, "models/checkpoint_last.pt", data="few")
