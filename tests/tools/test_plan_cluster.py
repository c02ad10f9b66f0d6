"""The planner against two processes that exist, against hand-made numbers, and with bad input."""

import argparse
from typing import Any
from unittest import mock

import pytest
import torch
from support.ranks import run_ranks
from torch import Tensor, distributed, nn

pytest.importorskip("fairseq")

from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from fairseq.optim.adam import Adam

from benchmarks.architectures import make_dictionary, quiet
from benchmarks.train_step import make_sample
from nmt_moe.criterions import MoECrossEntropy, MoELabelSmoothedCrossEntropy
from nmt_moe.models.lstm_moe_gnmt import LSTMMoEGNMT, LSTMMoEGNMTConfig
from nmt_moe.models.lstm_moe_lm import LSTMMoELM, LSTMMoELMConfig
from nmt_moe.parallel import measure_traffic, ring_bytes
from nmt_moe.training import FactoredAdam
from tools.activations import Batch
from tools.cluster import DEVICES, Setup, make_plan

SENTENCES, LENGTH, VOCABULARY = 24, 8, 300
SIZES = {"model_dim": 32, "lstm_hidden_dim": 48, "expert_hidden_dim": 64, "dropout": 0.1}
GROUPS = {"num_experts": 32, "moe_groups": 8, "moe_top_k": 2}
CASES: dict[str, dict[str, Any]] = {
    "flat": {"num_experts": 8, "moe_top_k": 2},
    "groups": {**GROUPS, "lm": True, "factored": True},
    "sampled": {"num_experts": 8, "moe_top_k": 4, "draws": 64, "expert_recompute": "always"},
    "dense": {"dense": True},
    "gnmt": {"num_experts": 8, "moe_top_k": 2, "gnmt": True},
    "gnmt parallel": {**GROUPS, "gnmt": True, "attention_wiring": "parallel"},
    "gnmt strict": {
        "num_experts": 8,
        "moe_top_k": 2,
        "gnmt": True,
        "moe_gate": "strictly_balanced",
    },
}
TOLERANCE = 0.1


def split(case: dict[str, Any]) -> tuple[Any, bool, int]:
    """Give a case's options of the model, whether its optimizer is factored, and its draws."""
    shell = ("lm", "gnmt", "factored", "draws")
    options = {**SIZES, **{name: value for name, value in case.items() if name not in shell}}
    config = LSTMMoEGNMTConfig if case.get("gnmt") else LSTMMoELMConfig
    return config(**options), case.get("factored", False), case.get("draws", 0)


def measure(rank: int) -> dict[str, dict[str, float]]:
    with quiet():
        return {name: measure_case(case) for name, case in CASES.items()}


def measure_case(case: dict[str, Any]) -> dict[str, float]:
    """Do one update, and count bytes of tensors and bytes sent."""
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
    if options.moe_gate == "strictly_balanced":  # gates of 0 give each token experts far apart
        for name, parameter in model.named_parameters():
            if name.endswith("gate.gate_weight"):
                torch.manual_seed(1)
                nn.init.normal_(parameter)
    parameters = list(model.parameters())
    parallel = LegacyDistributedDataParallel(model, distributed.group.WORLD)
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
        "balance": traffic.bytes_sent["balance"],
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
        # Of the two, as tokens choose either.
        found = sum(rank[name][part] for rank in measured) / 2
        assert found == pytest.approx(expected[part], rel=TOLERANCE), part
    assert measured[0][name]["weights"] == expected["weights"]
