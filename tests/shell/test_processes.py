"""On any machine, training uses exactly the processes that torchrun or the user started."""

import json
import shutil

import pytest
import torch
from fairseq.dataclass.configs import CommonConfig, DistributedTrainingConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

from nmt_moe.compat.processes import TORCHRUN
from tests.support.stock_model import LOG, run_apart, training


def make_config(world_size: int = 1, **fields):
    """Return the part of fairseq's configuration that describes the processes."""
    plan = DistributedTrainingConfig(distributed_world_size=world_size, **fields)
    parts = {"common": CommonConfig(cpu=True), "distributed_training": plan}
    return OmegaConf.create({name: OmegaConf.structured(part) for name, part in parts.items()})


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def alone(monkeypatch, no_gpu):
    for name in [*TORCHRUN, "SLURM_JOB_ID"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def under_torchrun(monkeypatch, no_gpu):
    for name, value in zip(TORCHRUN, ["localhost", "29500", "2", "1"], strict=True):
        monkeypatch.setenv(name, value)


def fix(cfg):
    """Return a configuration as the commands receive it."""
    distributed_utils.call_main(cfg, lambda cfg: None)
    return cfg


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("init_method", [None, "tcp://localhost:12345"])
def test_processes_that_would_never_start_are_refused(init_method):
    with pytest.raises(ValueError, match="nothing would be trained.*torchrun --nproc-per-node 2"):
        fix(make_config(2, distributed_init_method=init_method))


@pytest.mark.usefixtures("alone")
def test_the_settings_of_one_process_are_unchanged():
    assert fix(make_config()) == make_config()


@pytest.mark.usefixtures("alone")
def test_processes_started_by_hand_get_settings_that_work_on_the_cpu(monkeypatch):
    monkeypatch.setattr(distributed_utils, "distributed_main", lambda *_: None)
    address = "tcp://localhost:12345"
    cfg = fix(make_config(2, distributed_no_spawn=True, distributed_init_method=address))
    assert cfg.distributed_training.distributed_backend == "gloo"
    assert cfg.distributed_training.ddp_backend == "legacy_ddp"


@pytest.mark.usefixtures("under_torchrun")
def test_the_world_size_of_torchrun_is_used(monkeypatch):
    monkeypatch.setattr(distributed_utils, "distributed_main", lambda *_: None)
    assert fix(make_config()).distributed_training.distributed_world_size == 2


@pytest.mark.usefixtures("under_torchrun")
def test_the_rank_of_torchrun_needs_no_device():
    plan = make_config(2).distributed_training
    distributed_utils._infer_torch_distributed_launch_init(plan)
    assert (plan.distributed_rank, plan.distributed_world_size, plan.device_id) == (1, 2, 0)
    assert plan.distributed_no_spawn


def test_two_processes_of_torchrun_resume_one_model(stock):
    shutil.copytree(stock / "models", stock / "two")
    runner = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = training(stock, "two", 3, *LOG)
    result = run_apart(stock, *runner, "fairseq_cli.train", *arguments)
    assert result.returncode == 0, result.stderr
    assert "training on 2 devices" in result.stdout
    assert "@ 2 updates)" in result.stdout
    # Two separate runs would each log the update, but two ranks of one run log it once.
    lines = [line for line in result.stdout.splitlines() if "| train_inner |" in line]
    assert [json.loads(line.split(" | ")[-1])["num_updates"] for line in lines] == ["3"]
