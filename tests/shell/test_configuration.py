"""A configuration from a file only sets values, and cannot execute anything that it names."""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, models, options, tasks, utils
from fairseq.registry import REGISTRIES

from nmt_moe.cli.reshape import verify
from nmt_moe.compat.checkpoints import ignore_unsafe_loading
from nmt_moe.compat.configuration import evaluate_literal
from tests.support.commands import call

TRIPWIRE = "nmt_moe_tripwire"
HOSTILE = f"__import__('sys').modules.setdefault('{TRIPWIRE}', 1)"

GROUPS = {
    "model": models.MODEL_REGISTRY,
    "task": tasks.TASK_REGISTRY,
    **{name: entry["registry"] for name, entry in REGISTRIES.items()},
}
NAMES = [
    pytest.param(group, name, id=f"{group}-{name}")
    for group, registry in GROUPS.items()
    for name in sorted(registry)
]


@pytest.fixture
def tripwire():
    yield
    assert TRIPWIRE not in sys.modules


def option_names(found: Any) -> set[str]:
    """Return the names of all options of a class registered with fairseq."""
    parser = argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve")
    with suppress(Exception):  # some of fairseq's classes cannot list their options
        found.add_args(parser)
    names = {action.dest for action in parser._actions} - {"help"}
    dataclass = getattr(found, "__dataclass", None)
    return names | set(getattr(dataclass, "__dataclass_fields__", ()))


def hostile_settings(found: Any, name: str) -> dict[str, Any]:
    names = option_names(found) | {"encoder_layers", "decoder_layers", "decoder_attention"}
    return {**dict.fromkeys(names, HOSTILE), "_name": name}


def changed(checkpoint: Path, path: Path, **groups: Any) -> str:
    state = torch.load(checkpoint, weights_only=False)
    state["cfg"].update(groups)
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize(("group", "name"), NAMES)
def test_no_class_registered_with_fairseq_executes_a_setting(
    group: str, name: str, checkpoint: Path, tmp_path: Path, tripwire: None
):
    settings = hostile_settings(GROUPS[group][name], name)
    path = changed(checkpoint, tmp_path / "hostile.pt", **{group: settings})
    with suppress(Exception):
        loaded, args, task = checkpoint_utils.load_model_ensemble_and_task([path])
        task.build_criterion(args.criterion)


def test_the_tripwire_works_without_the_repair(monkeypatch):
    monkeypatch.delitem(vars(utils), "eval")  # fairseq's function then finds Python's `eval`
    with suppress(TypeError):
        utils.eval_str_list(HOSTILE)
    assert sys.modules.pop(TRIPWIRE, None) == 1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"_name": "fconv", "encoder_layers": HOSTILE}}, "names the model `fconv`"),
        ({"model": {"_name": "unheard_of"}}, r"the model `unheard_of`.*Add the --user-dir"),
        ({"task": {"_name": "audio_pretraining"}}, "names the task `audio_pretraining`"),
        ({"common": {"user_dir": "${oc.env:HOME}"}}, "refers to something outside"),
        ({"dataset": {"dataset_impl": "fasta"}}, "could start programs"),
    ],
)
def test_configurations_that_could_execute_code_are_refused_by_name(
    groups, message, checkpoint: Path, tmp_path: Path
):
    path = changed(checkpoint, tmp_path / "hostile.pt", **groups)
    with pytest.raises(ValueError, match=message):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_a_checkpoint_is_complete_only_if_it_fits_its_model(checkpoint: Path, tmp_path: Path):
    assert "fits `lstm_moe_gnmt`" in verify(checkpoint)
    name = "decoder.output.weight"

    def drop(state):
        del state["model"][name]

    def cut(state):
        state["model"][name] = state["model"][name][:, 1:]

    def claim(state):
        state["cfg"]["model"]["encoder_layers"] = 10**9

    def forget(state):
        del state["cfg"]

    def spoil(state):
        state["last_optimizer_state"] = [1]

    for change, message in [
        (drop, rf"{name} is missing"),
        (cut, rf"{name} is \("),
        (claim, "`encoder_layers` to 1000000000"),
        (forget, "no model configuration"),
        (spoil, "not a dictionary"),
    ]:
        state = torch.load(checkpoint, weights_only=False)
        change(state)
        torch.save(state, tmp_path / "changed.pt")
        with pytest.raises(ValueError, match=message):
            verify(tmp_path / "changed.pt")


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"num_experts": 10**9}, "sets `num_experts` to 1000000000"),
        ({"hidden_dim": 10**9}, "sets `hidden_dim` to 1000000000"),
        ({"model_dim": 10**7}, "sets `model_dim` to 10000000"),
        ({"encoder_layers": 10**6}, "sets `encoder_layers` to 1000000"),
        ({"num_experts": 10**5, "hidden_dim": 10**5}, r"describes a model with 64\d{10}"),
    ],
)
def test_a_model_too_large_for_its_checkpoint_is_not_built(
    claims, message, checkpoint: Path, tmp_path: Path
):
    state = torch.load(checkpoint, weights_only=False)
    state["cfg"]["model"].update(claims)
    torch.save(state, tmp_path / "claims.pt")
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "claims.pt")])
    assert torch.equal(torch.get_rng_state(), before)


def test_files_that_a_configuration_names_are_not_opened(checkpoint: Path, tmp_path: Path):
    state = torch.load(checkpoint, weights_only=False)
    state["cfg"]["common"]["user_dir"] = str(tmp_path)
    state["cfg"]["model"]["encoder_embed_path"] = str(tmp_path / "vectors")
    torch.save(state, tmp_path / "names.pt")
    cfg = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "names.pt"))["cfg"]
    assert cfg.common.user_dir is None
    assert cfg.model.encoder_embed_path is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[(512, 3)] * 3", [(512, 3)] * 3),
        ("[(1, 2)] + [(3, 4)] * 2", [(1, 2), (3, 4), (3, 4)]),
        ("(0.9, 0.98)", (0.9, 0.98)),
        ("-1.5", -1.5),
        ("True", True),
    ],
)
def test_literals_that_fairseq_uses_are_read(text: str, value: Any):
    assert evaluate_literal(text) == value
    assert utils.eval_str_list("[0.5, 1]") == [0.5, 1.0]


@pytest.mark.parametrize(
    "text", [HOSTILE, "print(1)", "[1] * 10**9", "'a' * 10**9", "[0] * 9 ** 99", "(" * 9999, 7]
)
def test_other_expressions_are_refused(text: Any, tripwire: None):
    with pytest.raises(ValueError, match="an option must be"):
        evaluate_literal(text)


def test_a_command_refuses_a_hostile_checkpoint(
    data: Path, checkpoint: Path, tmp_path: Path, tripwire: None
):
    model = {"_name": "fconv", "encoder_layers": HOSTILE}
    path = changed(checkpoint, tmp_path / "hostile.pt", model=model)
    with pytest.raises(ValueError, match="names the model `fconv`"):
        call("generate", data, "--path", path, "--cpu")


def test_the_environment_cannot_make_reading_unsafe(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ignore_unsafe_loading()
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ


def test_options_of_the_command_line_still_take_lists():
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(
        parser, ["data", "--arch", "fconv", "--lr", "0.1,0.2", "--optimizer", "adam"]
    )
    assert args.lr == [0.1, 0.2]
