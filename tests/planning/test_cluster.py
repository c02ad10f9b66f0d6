"""The planner agrees with two real processes and hand-computed figures, and refuses bad input."""

import argparse
import json
import os
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, distributed, nn

from tests.support.ranks import run_ranks

pytest.importorskip("fairseq")


from fairseq.distributed import utils as distributed_utils
from fairseq.optim.adam import Adam

from benchmarks.architectures import make_dictionary, quiet
from benchmarks.traffic import measure_traffic
from benchmarks.train_step import make_sample
from nmt_moe.cli import main
from nmt_moe.criterions import MoECrossEntropy, MoELabelSmoothedCrossEntropy
from nmt_moe.kernels._cpu import load
from nmt_moe.models.lstm_moe_gnmt import LSTMMoEGNMT, LSTMMoEGNMTConfig
from nmt_moe.models.lstm_moe_lm import LSTMMoELM, LSTMMoELMConfig
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, LSTMLMConfig
from nmt_moe.parallel import ring_bytes
from nmt_moe.planning import DEVICES, Batch, Setup, describe, find_options, make_plan
from nmt_moe.planning.batch import distinct_classes
from nmt_moe.planning.mixture import ranks_per_token
from nmt_moe.planning.network import count
from nmt_moe.trainer.data_parallel import ExpertParallelDataParallel
from nmt_moe.training import FactoredAdam

SENTENCES, LENGTH, VOCABULARY = 24, 8, 300
SIZES = {"model_dim": 32, "lstm_hidden_dim": 48, "hidden_dim": 64, "dropout": 0.1}
GROUPS = {"num_experts": 32, "num_groups": 8, "top_k": 2}
CASES: dict[str, dict[str, Any]] = {
    "flat": {"num_experts": 8, "top_k": 2},
    "groups": {**GROUPS, "lm": True, "factored": True},
    "sampled": {"num_experts": 8, "top_k": 4, "draws": 64, "recompute": "always"},
    "dense": {"dense": True},
    "no projection": {"num_experts": 8, "top_k": 2, "lstm_hidden_dim": 32},
    "gnmt": {"num_experts": 8, "top_k": 2, "gnmt": True},
    "gnmt parallel": {**GROUPS, "gnmt": True, "attention_wiring": "parallel"},
    "gnmt strict": {
        "num_experts": 8,
        "top_k": 2,
        "gnmt": True,
        "gate": "strictly_balanced",
    },
}
TOLERANCE = 0.1


def split(case: dict[str, Any]) -> tuple[Any, bool, int]:
    """Return a case's model options, whether Adam is factored, and how many classes are drawn."""
    shell = ("lm", "gnmt", "factored", "draws")
    options = {**SIZES, **{name: value for name, value in case.items() if name not in shell}}
    config = LSTMMoEGNMTConfig if case.get("gnmt") else LSTMMoELMConfig
    return config(**options), case.get("factored", False), case.get("draws", 0)


def measure(rank: int) -> dict[str, dict[str, float]]:
    # The predictions are for torch's operations. The CPU's compiled loops store less.
    with mock.patch.dict(os.environ, NMT_MOE_KERNELS="torch"), quiet():
        load.cache_clear()
        return {name: measure_case(case) for name, case in CASES.items()}


def measure_case(case: dict[str, Any]) -> dict[str, float]:
    """Perform one update; count the bytes that its tensors take up and the bytes sent."""
    options, is_factored, draws = split(case)
    torch.manual_seed(distributed.get_rank())
    dictionary = make_dictionary(VOCABULARY)
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    sample = make_sample(dictionary, SENTENCES, LENGTH, "cpu")
    if case.get("gnmt"):
        model: nn.Module = LSTMMoEGNMT.build_model(options, task)
        criterion = MoELabelSmoothedCrossEntropy(task, False, 0.1)
    else:
        model = LSTMMoELM.build_model(options, task)
        del sample["net_input"]["prev_output_tokens"]
        criterion = MoECrossEntropy(task, False, draws)
    # With gate weights of 0, strict balance would give each token experts that are far apart.
    if options.gate == "strictly_balanced":
        for name, parameter in model.named_parameters():
            if name.endswith("gate.gate_weight"):
                torch.manual_seed(1)
                nn.init.normal_(parameter)
    parameters = list(model.parameters())
    parallel = ExpertParallelDataParallel(model, distributed.group.WORLD)
    optimizer = (FactoredAdam if is_factored else Adam)(parameters, lr=1e-3)
    payload = []
    reduce = distributed_utils.all_reduce

    def count_and_reduce(tensor: Tensor, *args: Any, **kw: Any) -> Any:
        payload.append(tensor.nbytes)
        return reduce(tensor, *args, **kw)

    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with measure_traffic() as traffic:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = criterion(model.train(), sample)[0]
        own = {p.untyped_storage().data_ptr() for p in parameters}
        activations = sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in own)
        loss.backward()
    with mock.patch.object(distributed_utils, "all_reduce", count_and_reduce):
        parallel.all_reduce_grads()
    optimizer.step()
    state = [v for values in optimizer.state.values() for v in values.values()]
    return {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters),
        "optimizer": sum(v.nbytes for v in state if isinstance(v, Tensor)),
        "activations": activations,
        "exchange": traffic.bytes_sent["exchange"],
        "balance": traffic.bytes_sent["sum"],
        "dense gradients": ring_bytes(sum(payload), 2),
    }


def predict(case: dict[str, Any]) -> dict[str, float]:
    options, is_factored, draws = split(case)
    batch = Batch(SENTENCES, LENGTH, VOCABULARY, draws, on_cpu=True)
    config = options.to_config()
    size = 1 if config.moe is None else 2
    plan = make_plan(Setup(config, batch, 2, size, is_factored), DEVICES["cpu"], 0.3)
    return {**plan.memory, **plan.traffic}


@pytest.fixture(scope="module")
def measured() -> list[dict[str, dict[str, float]]]:
    return run_ranks(measure, 2)


@pytest.mark.timeout(590)
@pytest.mark.parametrize("name", CASES)
def test_predictions_are_within_ten_percent_of_what_two_processes_hold_and_send(name, measured):
    expected = predict(CASES[name])
    for part in measured[0][name]:
        # Compare the mean over both processes, because tokens may choose experts on either.
        found = sum(rank[name][part] for rank in measured) / 2
        assert found == pytest.approx(expected[part], rel=TOLERANCE), part
    assert measured[0][name]["weights"] == expected["weights"]


@pytest.mark.parametrize("wiring", ["recurrent", "parallel"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_totals_of_a_long_batch_equal_those_of_a_separate_run(wiring: str, on_cpu: bool):
    config = GNMTConfig(model_dim=8, lstm_hidden_dim=8, attention_wiring=wiring)
    batch = Batch(3, 9, 50, on_cpu=on_cpu)
    network, totals = describe(config, batch), count(config, batch)
    assert totals.macs == pytest.approx(network.macs())
    assert totals.kept == pytest.approx(network.kept)


def test_ranks_of_a_token_by_hand():
    # In 2 of 6 cases, both experts are on the same rank, so the mean is (2 x 1 + 4 x 2) / 6.
    moe = MoEConfig(model_dim=4, hidden_dim=4, num_experts=4, top_k=2)
    assert ranks_per_token(moe, 2) == pytest.approx(10 / 6)
    # Groups of a hierarchy are not split, so each of the four groups is on one rank.
    grouped = replace(moe, num_experts=8, num_groups=4, top_k=1)
    assert ranks_per_token(grouped, 4) == pytest.approx(1)
    assert ranks_per_token(replace(moe, gate="softmax"), 4) == 4


def test_the_number_of_distinct_classes_among_draws():
    assert distinct_classes(1, 50) == pytest.approx(1)
    # The documentation of the sampled softmax gives this number.
    assert distinct_classes(8192, 793_471) == pytest.approx(4600, rel=0.01)


def test_memory_by_hand():
    # The model has width 4, two LSTMs of 4 cells (4 x 4 x 8 weights and two biases of 16 in each),
    # 4 experts of 2 x 4 x 5 weights, a gate of two 4 x 4 matrices, and 10 symbols. The experts are
    # on two devices. Training in half precision keeps float32 copies.
    moe = MoEConfig(model_dim=4, hidden_dim=5, num_experts=4, top_k=2)
    config = LSTMLMConfig(model_dim=4, lstm_hidden_dim=4, moe=moe)
    dense, experts = 2 * (4 * 4 * 8 + 2 * 16) + 2 * 4 * 4 + 2 * 10 * 4, 2 * 2 * 4 * 5
    setup = Setup(config, Batch(1, 1, 10, number_bytes=2), 2, 2, True, "half")
    plan = make_plan(setup, DEVICES["h100"], 0.3)
    assert plan.parameters == (dense + experts, dense + 2 * experts)
    assert plan.memory["weights"] == plan.memory["gradients"] == 6 * (dense + experts)
    assert plan.memory["optimizer"] == 8 * dense + 4 * 2 * 2 * (4 + 5)
    assert plan.traffic["dense gradients"] == 2 * dense
    assert plan.traffic["expert gradients"] == 0


def run(*flags: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["plan", *map(str, flags), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


LARGEST = ["--arch", "lstm_moe_lm_100b_131072h", "--optimizer", "factored_adam"]
LARGEST += ["--sampled-softmax", 8192]


def test_the_largest_model_fits_on_128_current_devices_but_not_on_the_papers_devices():
    today = run(*LARGEST, "--devices", 128, "--device", "a100")
    assert today["parameters"][1] > 137_577_600_000
    assert today["setup"]["size"] == 128
    assert today["fits"]
    assert not today["fits_with"]
    assert not run(*LARGEST, "--devices", 128, "--device", "k40")["fits"]


def test_the_advised_changes_make_the_model_fit():
    flags = ["--arch", "lstm_moe_lm_1024h", "--devices", 4, "--device", "v100"]
    plan = run(*flags)
    assert not plan["fits"]
    for way in plan["fits_with"]:
        change = way.split(" (")[0].replace(" with ", " ").split()
        assert run(*flags, *change)["fits"], way
    assert plan["fits_with"]


def test_options_of_the_model_change_it():
    small = run("--arch", "lstm_moe_gnmt", "--num-experts", 4, "--dropout", 0)
    assert small["setup"]["config"]["moe"]["num_experts"] == 4
    # A dropout mask would take one byte per element.
    assert small["activations"]["embeddings"] < 160 * 25 * 512


def test_every_architecture_can_be_planned():
    for name in find_options():
        result = CliRunner().invoke(main, ["plan", "--arch", name, "--devices", "2"])
        assert result.exit_code == 0, result.stderr
        assert "fit" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch lstm_moe_lm_4096", "but is 'lstm_moe_lm_4096'.*lstm_moe_lm_4096h"),
        ("--devices 0", "`--devices` must be at least 1, but is 0"),
        ("--devices 4 --expert-parallel-size 3", "`--devices` must be a multiple of .*, 3"),
        ("--devices 3 --expert-parallel-size 3", "`--num-experts` must be a multiple of .*, 3"),
        ("--sampled-softmax 9 --vocab-size 8", "`--sampled-softmax` must be from 0 to 8, but is 9"),
        ("--device k40 --precision bf16", "the FLOP/s of a k40 in half precision"),
        ("--memory -1", "`--memory` must be greater than 0, but is -1"),
        ("--utilisation 2", "`--utilisation` must be from 0 to 1, but is 2"),
        ("--top-k 33", "`--top-k` must be from 1 to 32, but is 33"),
        ("--arch lstm_moe_gnmt --sampled-softmax 8", "must be 0 for a translation model"),
    ],
)
def test_bad_input_is_refused(flags: str, message: str):
    arch = [] if "--arch" in flags else ["--arch", "lstm_moe_lm_32"]
    result = CliRunner().invoke(main, ["plan", *arch, *flags.split()])
    assert result.exit_code == 1
    assert re.search(message, result.stderr)
