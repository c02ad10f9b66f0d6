"""Training gives the same results with experts spread over two processes as in one process."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from nmt_moe.checkpoints import MANIFEST
from nmt_moe.parallel import ExpertParallelGroup, mark_expert
from nmt_moe.trainer.experts import own_expert_state
from nmt_moe.trainer.settings import check_expert_parallel
from tests.support.commands import call
from tests.support.ranks import run_ranks
from tests.support.training import (
    TINY_MOE,
    TRANSLATE,
    assert_same_bits,
    copy_checkpoint,
    load,
    load_whole,
)

# With five batches, one of two processes is idle in the third and last update of an epoch.
FIVE_BATCHES = ["--batch-size", 20, "--required-batch-size-multiple", 1, "--clip-norm", 0.5]
FIVE_BATCHES += ["--no-epoch-checkpoints", "--importance-loss-weight", 1.0]
# Each token uses all experts, without noise or dropout, so that one process can give the same
# results. Epsilon is large, because otherwise Adam would turn rounding errors in zero gradients
# into full steps.
EXACT = [*FIVE_BATCHES, "--moe-gate", "softmax", "--dropout", 0, "--adam-eps", 1.0, "--lr", 0.5]
EXACT += ["--max-update", 4, "--save-interval-updates", 2]
UNEVEN = [*FIVE_BATCHES, "--max-epoch", 2]
# With these options, the number of steps until all translations end differs between the processes.
BLEU = ["--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 20}', "--batch-size-valid", 5]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def train_on_ranks(rank: int, data: Path, folder: Path) -> None:
    """Do all training runs for the tests below together, because starting processes is slow."""
    ranks = ["--distributed-world-size", 2, "--distributed-no-spawn", "--distributed-rank", rank]
    ranks += ["--distributed-init-method", "tcp://unused", "--cpu"]

    def train(name: str, *flags: object) -> None:
        call("train", data, *TINY_MOE, *flags, *ranks, "--save-dir", folder / name)

    train("exact", *EXACT)
    train("resumed", *EXACT)
    for size in (1, 2):
        split = ["--expert-parallel-size", size]
        train(f"noisy{size}", *UNEVEN, *split, *BLEU)
        train(f"groups{size}", *UNEVEN, *split, "--moe-groups", 2)
        train(f"factored{size}", *UNEVEN, *split, "--optimizer", "factored_adam")
        train(f"bf16-{size}", *UNEVEN, *split, "--bf16", "--save-interval-updates", 4)
        train(f"fp16-{size}", *UNEVEN, *split, "--memory-efficient-fp16", "--update-freq", 2)
    if rank == 0:
        (folder / "bf16-resumed").mkdir()
        copy_checkpoint(folder / "bf16-2/checkpoint_2_4.pt", folder / "bf16-resumed")
    distributed.barrier()
    train("bf16-resumed", *UNEVEN, "--bf16")


def resume_on_four(rank: int, data: Path, folder: Path) -> None:
    """Continue on four processes from the files of two, in one expert-parallel group and in two."""
    ranks = ["--distributed-world-size", 4, "--distributed-no-spawn", "--distributed-rank", rank]
    ranks += ["--distributed-init-method", "tcp://unused", "--cpu"]
    for size in (4, 2):
        flags = [*TINY_MOE, *UNEVEN, "--expert-parallel-size", size]
        flags += ["--max-epoch", 9, "--max-update", 8]
        call("train", data, *flags, *ranks, "--save-dir", folder / f"size{size}")


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for 4 updates in one process, with the batches of two processes."""
    folder = tmp_path_factory.mktemp("one")
    flags = [*TINY_MOE, *EXACT, "--update-freq", 2]
    call("train", data, *flags, "--save-dir", folder)
    return folder


@pytest.fixture(scope="module")
def two_processes(data: Path, one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do all runs in two processes; the run `resumed` continues from the file of one process."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "resumed").mkdir()
    shutil.copy(one_process / "checkpoint_1_2.pt", folder / "resumed/checkpoint_last.pt")
    run_ranks(train_on_ranks, 2, data, folder)
    return folder


def assert_same_training(expected: Path, actual: Path, **tolerance: float) -> None:
    one, other = load_whole(expected), load_whole(actual)
    assert one["model"].keys() == other["model"].keys()
    for name, value in one["model"].items():
        torch.testing.assert_close(other["model"][name], value, **tolerance, msg=name)
    states = [checkpoint["last_optimizer_state"]["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    for index, values in states[0].items():
        for name, value in values.items():
            torch.testing.assert_close(states[1][index][name], value, **tolerance)
    assert other["extra_state"]["val_loss"] == pytest.approx(
        one["extra_state"]["val_loss"], abs=2e-3
    )


@pytest.mark.timeout(590)
def test_two_processes_with_half_the_experts_each_learn_the_same_as_one(one_process, two_processes):
    name = "checkpoint_last.pt"
    assert_same_training(one_process / name, two_processes / "exact" / name, **TOLERANCE)


def test_two_processes_continue_from_the_file_of_one(one_process, two_processes):
    name = "checkpoint_last.pt"
    assert_same_training(one_process / name, two_processes / "resumed" / name, **TOLERANCE)


def test_one_process_continues_from_the_files_of_two(data, one_process, two_processes, tmp_path):
    copy_checkpoint(two_processes / "exact/checkpoint_1_2.pt", tmp_path)
    flags = [*TINY_MOE, *EXACT, "--update-freq", 2]
    assert len(list(tmp_path.glob("experts-*"))) == 2
    call("train", data, *flags, "--save-dir", tmp_path)
    name = "checkpoint_last.pt"
    assert_same_training(one_process / name, tmp_path / name, **TOLERANCE)
    assert not list(tmp_path.glob("experts-*"))  # no checkpoint needs them


@pytest.mark.timeout(590)
def test_four_processes_continue_from_the_files_of_two(data, two_processes, tmp_path):
    for size in (4, 2):
        (tmp_path / f"size{size}").mkdir()
        copy_checkpoint(two_processes / "noisy2/checkpoint_last.pt", tmp_path / f"size{size}")
    run_ranks(resume_on_four, 4, data, tmp_path)
    whole = []
    for size in (4, 2):
        path = tmp_path / f"size{size}/checkpoint_last.pt"
        assert load(path)["optimizer_history"][-1]["num_updates"] == 8
        files = load(path)[MANIFEST]["files"]
        assert [entry["stop"] - entry["start"] for entry in files] == [4 // size] * size
        whole.append(path)
    assert_same_training(*whole, **TOLERANCE)


def test_one_process_translates_with_the_experts_of_two(data, one_process, two_processes):
    paths = [one_process / "checkpoint_last.pt", two_processes / "exact/checkpoint_last.pt"]
    texts = [call("generate", data, *TRANSLATE, "--path", path).hypotheses() for path in paths]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["noisy", "groups", "factored"])
def test_spread_experts_learn_the_same_as_copies(two_processes, kind):
    name = "checkpoint_last.pt"
    copies, spread = (two_processes / f"{kind}{size}" / name for size in (1, 2))
    assert_same_training(copies, spread, **TOLERANCE)


def test_training_with_bleu_continues(data, two_processes, tmp_path):
    copy_checkpoint(two_processes / "noisy2/checkpoint_last.pt", tmp_path)
    output = call(
        *["train", data, *TINY_MOE, *UNEVEN, *BLEU, "--max-epoch", 3, "--save-dir", tmp_path]
    )
    assert '"valid_bleu": ' in output.text
    assert load(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 11


@pytest.mark.parametrize("kind", ["bf16-", "fp16-"])
def test_in_half_precision_spread_experts_learn_the_same_as_copies_except_for_rounding(
    two_processes, kind
):
    name = "checkpoint_last.pt"
    copies, spread = (two_processes / f"{kind}{size}" / name for size in (1, 2))
    assert_same_training(copies, spread, atol=0.05, rtol=0.05)


def test_spread_experts_in_half_precision_resume_bit_for_bit(two_processes):
    name = "checkpoint_last.pt"
    one, two = (load_whole(two_processes / f"bf16-{kind}" / name) for kind in ("2", "resumed"))
    assert_same_bits(one["model"], two["model"])
    assert_same_bits(one["last_optimizer_state"], two["last_optimizer_state"])
    weight = one["model"]["decoder.network.moe.moe.experts.weight_in"]
    assert not weight.equal(weight.bfloat16().float())


def test_experts_can_be_saved_before_their_optimizer_knows_them():
    weight = torch.nn.Parameter(torch.ones(2, 3, 4))
    mark_expert(weight, ExpertParallelGroup(size=2))
    inner = SimpleNamespace(state={})
    optimizer = SimpleNamespace(params=[torch.nn.Parameter(torch.ones(3)), weight], optimizer=inner)
    assert own_expert_state(optimizer) == {1: {}}
    inner.state[weight] = {"step": 1, "exp_avg": torch.zeros(2, 3, 4)}
    assert own_expert_state(optimizer)[1].keys() == {"exp_avg"}


def settings(**changes):
    """Return valid settings, with changes such as `common__amp=True`."""
    cfg = SimpleNamespace(
        checkpoint=SimpleNamespace(write_checkpoints_asynchronously=False),
        distributed_training=SimpleNamespace(ddp_backend="legacy_ddp", zero_sharding="none"),
        common=SimpleNamespace(amp=False, model_parallel_size=1),
        optimization=SimpleNamespace(use_bmuf=False),
        ema=SimpleNamespace(store_ema=False),
        optimizer=SimpleNamespace(_name="adam"),
    )
    for name, value in changes.items():
        part, field = name.split("__", 1)
        setattr(getattr(cfg, part), field, value)
    return cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"distributed_training__ddp_backend": "pytorch_ddp"},
            "`--ddp-backend` must be legacy_ddp where .* among 4 processes, but is pytorch_ddp, .*"
            "Use `--ddp-backend legacy_ddp` or `--expert-parallel-size 1`",
        ),
        ({"common__amp": True}, "`--amp` cannot be used where the experts are divided"),
        ({"optimization__use_bmuf": True}, "`--use-bmuf` cannot .* Leave it out or use"),
        ({"distributed_training__zero_sharding": "os"}, "`--zero-sharding` cannot"),
        ({"ema__store_ema": True}, "`--store-ema` cannot"),
        ({"optimizer___name": "composite"}, "`--optimizer composite` cannot"),
        (
            {"checkpoint__write_checkpoints_asynchronously": True},
            "`--write-checkpoints-asynchronously` cannot",
        ),
        ({"common__model_parallel_size": 2}, "`--model-parallel-size` cannot"),
    ],
)
def test_options_that_do_not_work_with_spread_experts_are_refused(change, message):
    check_expert_parallel(settings(), 4)
    with pytest.raises(ValueError, match=message):
        check_expert_parallel(settings(**change), 4)
