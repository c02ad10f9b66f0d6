"""Language models do not translate, and translation models are not language models."""

from pathlib import Path

import pytest

from tests.support.commands import call
from tests.support.language_model import TEXT
from tests.support.training import TINY_MOE, TRANSLATE, UPDATES, without_updates


@pytest.mark.parametrize("architecture", ["lstm_moe_lm_4", "lstm_lm"])
def test_a_language_model_is_not_trained_to_translate(
    architecture: str, data: Path, tmp_path: Path
):
    flags = ["--arch", architecture, *UPDATES, "--save-dir", tmp_path]
    with without_updates(), pytest.raises(ValueError, match=f"`{architecture}` is a language mod"):
        call("train", data, *flags)


@pytest.mark.parametrize("architecture", ["lstm_moe_gnmt_small", "lstm"])
def test_a_translation_model_is_not_trained_on_plain_text(
    architecture: str, text_data: Path, tmp_path: Path
):
    flags = [*TINY_MOE, *TEXT, "--arch", architecture, "--save-dir", tmp_path]
    if architecture == "lstm":
        flags = ["--arch", "lstm", *TEXT, *UPDATES, "--save-dir", tmp_path]
    with without_updates(), pytest.raises(ValueError, match=f"`{architecture}` translates"):
        call("train", text_data, *flags)


@pytest.mark.parametrize("command", ["eval_lm", "generate"])
def test_a_checkpoint_of_translation_is_not_taken_for_a_language_model(
    command: str, checkpoint: Path, text_data: Path
):
    flags = TRANSLATE if command == "generate" else TRANSLATE[:3]
    task = ["--task", "language_modeling", "--path", checkpoint]
    with pytest.raises(ValueError, match="`lstm_moe_gnmt` translates; it is not a language model"):
        call(command, text_data, *flags, *task)


def test_a_direction_other_than_that_of_training_causes_a_warning(data: Path, checkpoint: Path):
    flags = ["--path", checkpoint, *TRANSLATE, "--batch-size", 8]
    there = call("generate", data, *flags)
    back = call("generate", data, *flags, "-s", "bb", "-t", "aa")
    warning = "the model was trained to translate aa-bb, not bb-aa"
    assert warning in back.text
    assert warning not in there.text
