"""With `--optimizer factored_adam`, Adam trains all parameters except experts, at any precision."""

import shutil
from pathlib import Path

import pytest
import torch
from fairseq import optim
from omegaconf import OmegaConf

from nmt_moe import plugin
from nmt_moe.parallel import mark_expert
from tests.support.commands import Output, call
from tests.support.training import TINY_DENSE, TINY_MOE, assert_same_bits, load

plugin.register()

from nmt_moe.optim.factored_adam import FactoredAdamConfig, FairseqFactoredAdam  # noqa: E402

FACTORED = ["--optimizer", "factored_adam"]


def train(data: Path, folder: Path, epochs: int, *flags: object) -> Output:
    flags = [*TINY_MOE, *FACTORED, "--no-epoch-checkpoints", *flags]
    return call("train", data, *flags, "--max-epoch", epochs, "--save-dir", folder)


def losses(output: Output) -> list[float]:
    return [record["train_loss"] for record in output.records() if "train_loss" in record]


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Output]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train(data, folder, 4)


def test_experts_keep_rows_and_columns_and_other_parameters_adams_moments(unbroken):
    folder, output = unbroken
    checkpoint = load(folder / "checkpoint_last.pt")
    states = list(checkpoint["last_optimizer_state"]["state"].values())
    factored = [state for state in states if "row_mean" in state]
    # Encoder and decoder each have one layer of 4 experts. An expert has two matrices, and both its
    # width and its hidden width are 16.
    assert [tuple(state["row_mean"].shape) for state in factored] == [(4, 16)] * 4
    assert all(sorted(state) == ["column_mean", "row_mean", "step"] for state in factored)
    dense = [state for state in states if "row_mean" not in state]
    assert all(sorted(state) == ["exp_avg", "exp_avg_sq", "step"] for state in dense)
    assert len(dense) > 10
    assert {state["step"] for state in states} == {24}
    assert losses(output)[-1] < losses(output)[0]


def test_training_resumes_with_the_same_bits(data: Path, unbroken, tmp_path: Path):
    train(data, tmp_path, 2)
    train(data, tmp_path, 4)
    one, two = (load(folder / "checkpoint_last.pt") for folder in (unbroken[0], tmp_path))
    for part in ("model", "last_optimizer_state"):
        assert_same_bits(one[part], two[part], part)


def test_overrides_take_effect_at_the_restart(data: Path, unbroken, tmp_path: Path):
    shutil.copy(unbroken[0] / "checkpoint_last.pt", tmp_path)
    flags = ["--lr", 0.001, "--optimizer-overrides", "{'betas': (0.5, 0.9)}"]
    train(data, tmp_path, 5, *flags)
    group = load(tmp_path / "checkpoint_last.pt")["last_optimizer_state"]["param_groups"][0]
    assert group["lr"] <= 0.001
    assert tuple(group["betas"]) == (0.5, 0.9)


def test_a_model_without_experts_is_trained_as_with_adam(data: Path, tmp_path: Path):
    models = []
    flags = ["--weight-decay", 0.01, "--adam-betas", "(0.8, 0.95)", "--adam-eps", 1e-4]
    for name in ("adam", "factored_adam"):
        own = [*flags, "--optimizer", name, "--max-update", 4, "--save-dir", tmp_path / name]
        call("train", data, *TINY_DENSE, *own)
        models.append(load(tmp_path / name / "checkpoint_last.pt")["model"])
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], rtol=1e-4, atol=1e-6)


def test_the_clipped_norm_is_that_of_all_parameters(data: Path, tmp_path: Path):
    norms = []
    for name in ("adam", "factored_adam"):
        flags = ["--optimizer", name, "--max-update", 1, "--log-interval", 1, "--no-save"]
        flags += ["--clip-norm", 0.001, "--save-dir", tmp_path]
        records = call("train", data, *TINY_MOE, *flags).records()
        norms.append([record["gnorm"] for record in records if "gnorm" in record])
    assert norms[0]
    assert norms[0] == norms[1]


@pytest.mark.parametrize(
    ("flag", "starts"),
    [  # one precision of each kind is resumed, because fairseq handles both kinds in the same way
        ("--fp16", (1, 2)),
        ("--bf16", (2,)),
        ("--memory-efficient-fp16", (2,)),
        ("--memory-efficient-bf16", (1, 2)),
    ],
)
def test_training_in_half_precision_resumes(
    data: Path, tmp_path: Path, flag: str, starts: tuple[int, ...]
):
    for epochs in starts:
        train(data, tmp_path, epochs, flag, "--fp16-init-scale", 4)
    checkpoint = load(tmp_path / "checkpoint_last.pt")
    states = checkpoint["last_optimizer_state"]["state"].values()
    assert sum("row_mean" in state for state in states) == 4
    assert {state["step"] for state in states} == {12}
    means = [value for state in states for value in state.values() if torch.is_tensor(value)]
    assert {value.dtype for value in means} == {torch.float32}
    assert all(value.isfinite().all() for value in means)


def make_config(**options: object):
    values = {"_name": "factored_adam", "lr": [0.1], **options}
    return OmegaConf.structured(FactoredAdamConfig(**values))


def make_parameters() -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.ones(2, 3, 4)), torch.nn.Parameter(torch.ones(3))]
    mark_expert(parameters[0])
    return parameters


def test_flat_half_precision_gradients_are_refused_with_the_required_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = OmegaConf.create(
        {
            "common": {"fp16": True, "bf16": False, "fp16_no_flatten_grads": False},
            "optimizer": make_config(),
        }
    )
    with pytest.raises(ValueError, match=r"`--fp16` joins .* Add --fp16-no-flatten-grads"):
        optim.FP16Optimizer.build_optimizer(config, make_parameters())


@pytest.mark.parametrize("betas", ["0.9", "(0.9, 0.99, 0.5)", "(0.9; 0.99)", "('a', 'b')"])
def test_betas_that_are_not_a_pair_are_refused(betas: str):
    with pytest.raises(ValueError, match="`--adam-betas` must be a pair such as"):
        FairseqFactoredAdam(make_config(adam_betas=betas), make_parameters())


def test_adams_state_is_refused_if_there_are_experts():
    adam = torch.optim.AdamW(make_parameters())
    for parameter in adam.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    optimizer = FairseqFactoredAdam(make_config(), make_parameters())
    with pytest.raises(ValueError, match=r"saved by another optimizer.*--reset-optimizer"):
        optimizer.load_state_dict(adam.state_dict())
