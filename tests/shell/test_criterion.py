"""The loss and its log columns. Balance losses have the same weight in batches of any size."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fairseq.distributed import ModuleProxyWrapper
from fairseq.logging import metrics
from torch import Tensor, nn
from torch.nn import functional as F

from nmt_moe.criterions import MoELabelSmoothedCrossEntropy
from nmt_moe.criterions import moe_label_smoothed_cross_entropy as module
from nmt_moe.criterions._balance import add_balance, check_finite
from nmt_moe.kernels import _backend
from tests.support.commands import call
from tests.support.models import make_model, make_sample, make_task, without_noise
from tests.support.training import UPDATES

WIDTHS = ("embed-dim", "hidden-size")
SAMPLE = make_sample(["abc", "jihg", "e"], ["ffab", "cd", "jj"])
TWICE = make_sample(["abc", "jihg", "e"] * 2, ["ffab", "cd", "jj"] * 2)


def make_criterion(smoothing: float = 0.1, sentence_avg: bool = False) -> nn.Module:
    return MoELabelSmoothedCrossEntropy(make_task(), sentence_avg, smoothing)


def make_training_model(weight: float = 0.5, **options: object) -> nn.Module:
    weights = {"importance_weight": weight, "load_weight": weight}
    return without_noise(make_model(**weights, **options).train())


def gradients(model: nn.Module, batches: list[dict], **options: bool) -> dict[str, Tensor]:
    """Accumulate the batches' gradients and divide them by the sample size, as fairseq does."""
    criterion, sample_size = make_criterion(**options), 0
    model.zero_grad()
    for batch in batches:
        loss, size, _ = criterion(model, batch)
        loss.backward()
        sample_size += size
    return {
        name: parameter.grad / sample_size
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_the_balance_weighs_the_same_in_large_batches_and_in_accumulated_ones(sentence_avg: bool):
    model = make_training_model(weight=3.0)
    options = {"sentence_avg": sentence_avg}
    once = gradients(model, [SAMPLE], **options)
    for batches in ([TWICE], [SAMPLE, SAMPLE], [SAMPLE, TWICE, SAMPLE]):
        other = gradients(model, batches, **options)
        assert other.keys() == once.keys()
        for name, gradient in once.items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    gate = "encoder.network.moe.moe.gate.gate_weight"
    light = gradients(make_training_model(weight=0.0), [SAMPLE], **options)
    assert not once[gate].allclose(light[gate], rtol=0.1)


def test_the_loss_by_hand():
    model = make_training_model()
    loss, sample_size, log = make_criterion(smoothing=0.3)(model, SAMPLE)
    logits, extra = model(**SAMPLE["net_input"])
    assert sample_size == SAMPLE["ntokens"] == 5 + 3 + 3
    pad, size = 1, logits.shape[2]
    wanted = SAMPLE["target"] != pad
    log_probs = F.log_softmax(logits, dim=2)[wanted]
    nll = -log_probs.gather(1, SAMPLE["target"][wanted].unsqueeze(1)).sum()
    # In fairseq's label smoothing, all symbols except the target share 0.3.
    share = 0.3 / (size - 1)
    smooth = (1 - 0.3 - share) * nll - share * log_probs.sum()
    balance = sum(stats.balance_loss for stats in extra["moe_stats"].values())
    assert balance > 0
    torch.testing.assert_close(log["nll_loss"], nll)
    torch.testing.assert_close(loss, smooth + sample_size * balance)
    torch.testing.assert_close(log["balance_loss"], sample_size * balance)


def test_perplexity_is_free_of_smoothing_and_of_the_balance():
    logs = [
        make_criterion(smoothing)(make_training_model(weight), SAMPLE)[2]
        for smoothing, weight in [(0.0, 0.0), (0.3, 9.0)]
    ]
    assert logs[0]["nll_loss"] == logs[1]["nll_loss"]
    assert logs[0]["loss"] < logs[1]["loss"]
    values = [reduce_metrics([log]) for log in logs]
    assert values[0]["nll_loss"] == values[1]["nll_loss"]
    assert values[0]["ppl"] == values[1]["ppl"]
    # The losses are sums over 11 tokens, in nats, but fairseq logs bits per token.
    bits = logs[0]["nll_loss"].item() / 11 / math.log(2)
    assert values[0]["nll_loss"] == pytest.approx(bits, abs=1e-3)


def test_validation_has_no_balance_loss():
    model = make_training_model(weight=9.0)
    loss, _, log = make_criterion(smoothing=0.0)(model.eval(), SAMPLE)
    assert loss == log["nll_loss"]
    assert "balance_loss" not in log
    assert log["encoder_moe_load"].sum() == SAMPLE["net_input"]["src_lengths"].sum() * 2


def reduce_metrics(logs: list[dict]) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as aggregator:
        MoELabelSmoothedCrossEntropy.reduce_metrics(logs)
    return aggregator.get_smoothed_values()


def make_log(encoder: list[float], decoder: list[float], **values: float) -> dict:
    layers = {"encoder": encoder, "decoder": decoder}
    kinds = ("importance", "load", "tokens_per_expert")
    vectors = {
        f"{name}_moe_{kind}": torch.tensor(vector)
        for name, vector in layers.items()
        for kind in kinds
    }
    sums = {"gate_entropy": 2.0, "gate_margin": 1.0}
    of_gates = {
        f"{name}_moe_{kind}": torch.tensor(value) for name in layers for kind, value in sums.items()
    }
    sizes = {"loss": 4.0, "nll_loss": 3.0, "ntokens": 10, "sample_size": 10}
    return {**sizes, **vectors, **of_gates, **values}


def test_the_balance_of_several_batches_is_that_of_their_sums_by_hand():
    # The encoder's sum [2, 6] + [6, 2] = [8, 8] is balanced, although each batch has mean 4 and
    # deviation 2. The decoder's sum [1, 3] + [1, 3] = [2, 6] has mean 4, deviation 2 and maximum 6.
    logs = [make_log([2.0, 6.0], [1.0, 3.0]), make_log([6.0, 2.0], [1.0, 3.0])]
    values = reduce_metrics(logs)
    for kind in ("importance", "load"):
        assert values[f"encoder_moe_cv_{kind}"] == pytest.approx(0.0)
        assert values[f"decoder_moe_cv_{kind}"] == pytest.approx(0.5)
        assert values[f"moe_cv_{kind}"] == pytest.approx(0.25)
    assert values["encoder_moe_max_load"] == pytest.approx(1.0)
    assert values["decoder_moe_max_load"] == pytest.approx(1.5)
    assert values["moe_max_load"] == pytest.approx(1.25)


def test_columns_of_gates_are_means_over_all_tokens_and_rows_are_those_of_the_update_by_hand():
    # The encoder receives 8 tokens and then 4. In each batch, the entropies sum to 2, and the
    # margins sum to 1.
    values = reduce_metrics([make_log([2.0, 6.0], [4.0, 0.0]), make_log([4.0, 0.0], [4.0, 0.0])])
    assert values["encoder_moe_gate_entropy"] == pytest.approx(4 / 12, abs=1e-3)
    assert values["encoder_moe_gate_margin"] == pytest.approx(2 / 12, abs=1e-3)
    assert values["decoder_moe_gate_entropy"] == pytest.approx(4 / 8)
    assert values["encoder_moe_rows_per_expert"] == 6
    assert values["encoder_moe_idle_experts"] == 0
    assert values["decoder_moe_idle_experts"] == 1
    assert values["moe_idle_experts"] == pytest.approx(0.5)


def test_the_entropy_and_margin_of_gates_are_within_their_bounds():
    model = make_training_model()
    _, _, log = make_criterion()(model, SAMPLE)
    values = reduce_metrics([log])
    assert 0 < values["encoder_moe_gate_entropy"] <= math.log(2)
    assert 0 <= values["encoder_moe_gate_margin"] < 1


def test_the_balance_of_an_evaluation_is_that_of_all_its_batches_together():
    # As in validation, the same batches are reduced one by one.
    logs = [make_log([2.0, 6.0], [1.0, 3.0]), make_log([6.0, 2.0], [1.0, 3.0])]
    with metrics.aggregate(new_root=True) as aggregator:
        for log in logs:
            MoELabelSmoothedCrossEntropy.reduce_metrics([log])
    values = aggregator.get_smoothed_values()
    assert values == pytest.approx(reduce_metrics(logs))
    assert values["encoder_moe_cv_load"] == 0.0
    assert values["moe_cv_load"] == 0.25
    # During training, each update counts separately. The result is the mean of 0.5 and 0.5.
    with metrics.aggregate(new_root=True) as aggregator:
        for log in logs:
            MoELabelSmoothedCrossEntropy.reduce_metrics([{**log, "balance_loss": 1.0}])
    assert aggregator.get_smoothed_values()["encoder_moe_cv_load"] == 0.5


def test_the_balance_loss_of_several_batches_is_weighted_by_their_size():
    # With 0.2 for each of 10 tokens and 0.5 for each of 30, the mean is (2 + 15) / 40.
    logs = [
        make_log([1.0], [1.0], balance_loss=2.0),
        make_log([1.0], [1.0], balance_loss=15.0, sample_size=30),
    ]
    assert reduce_metrics(logs)["balance_loss"] == pytest.approx(17 / 40)


@pytest.fixture
def logs_of_two_ranks() -> Iterator[list[dict]]:
    model = make_training_model()
    return [make_criterion()(model, sample)[2] for sample in (SAMPLE, make_sample(["a"], ["b"]))]


def test_ranks_log_equal_keys_and_shapes_so_that_logs_can_be_summed(logs_of_two_ranks: list):
    assert MoELabelSmoothedCrossEntropy.logging_outputs_can_be_summed()
    one, other = logs_of_two_ranks
    assert one.keys() == other.keys()
    for key in one:
        assert torch.as_tensor(one[key]).shape == torch.as_tensor(other[key]).shape, key
    summed = {key: one[key] + other[key] for key in one}
    assert reduce_metrics([summed]) == pytest.approx(reduce_metrics([one, other]))


def test_a_dense_model_logs_no_balance():
    _, _, log = make_criterion()(make_training_model(dense=True), SAMPLE)
    assert not [key for key in log if "moe" in key or "balance" in key]
    assert "ppl" in reduce_metrics([log])


@pytest.mark.parametrize("extra", [None, torch.zeros(2), [None], {"inner_states": []}])
def test_additional_outputs_of_other_models_are_ignored(extra: object):
    loss = torch.ones(())
    log = {"sample_size": 3}
    assert add_balance(loss, 3, extra, log, is_training=True) == loss
    assert log == {"sample_size": 3}
    with pytest.raises(FloatingPointError, match="The loss is NaN"):
        check_finite(loss * math.nan, {"id": torch.arange(3)}, extra)


@pytest.mark.parametrize("architecture", ["lstm", "fconv"])
def test_fairseqs_own_models_train_with_the_criterion(
    architecture: str, data: Path, tmp_path: Path
):
    widths = [f"--{side}-{name}=16" for side in ("encoder", "decoder") for name in WIDTHS]
    flags = {
        "lstm": [*widths, "--decoder-out-embed-dim", 16],
        "fconv": [f"--{side}-layers=[(16, 3)]" for side in ("encoder", "decoder")],
    }
    common = ["--arch", architecture, *UPDATES, "--max-update", 1, "--no-save"]
    done = call("train", data, *common, *flags[architecture], "--save-dir", tmp_path)
    assert "valid_ppl" in done.text
    assert "moe" not in done.records()[-1]


def test_a_model_of_several_processes_is_recognised_under_its_wrappers(monkeypatch):
    monkeypatch.setattr(module, "has_compiled_loops", lambda _: True)
    model, logits = make_model(), torch.zeros(2, 8)
    parallel = nn.Module()  # holds its model as DistributedDataParallel does
    parallel.module = model
    assert module.has_plain_softmax(ModuleProxyWrapper(parallel), logits)
    model.decoder.adaptive_softmax = nn.Identity()
    assert not module.has_plain_softmax(ModuleProxyWrapper(parallel), logits)


def test_a_loss_that_is_not_a_number_names_its_sentences():
    model = make_training_model()
    nn.init.constant_(model.decoder.output.weight, math.nan)
    with pytest.raises(FloatingPointError, match=r"loss is NaN .* sentences \[0, 1, 2\].*`--lr`"):
        make_criterion()(model, SAMPLE)


def test_a_layer_that_did_not_wait_for_its_device_is_named(monkeypatch):
    monkeypatch.setattr(_backend, "HOST_DEVICES", frozenset())  # as on a GPU
    model = make_training_model()
    nn.init.constant_(model.encoder.network.moe.moe.gate.gate_weight, math.nan)
    with pytest.raises(FloatingPointError, match="tokens or gate weights of the .*MoE layer"):
        make_criterion()(model, SAMPLE)
