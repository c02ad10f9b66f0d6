"""The full and the sampled loss of language models, with the same balance losses."""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fairseq.logging import metrics
from torch import nn
from torch.nn import functional as F

from nmt_moe.criterions import MoECrossEntropy
from nmt_moe.training import ClassSample
from tests.support.models import make_model as make_translation
from tests.support.models import make_sample as make_pairs
from tests.support.models import without_noise
from tests.support.text_models import SAMPLE, make_model, make_sample, make_task

NUM_TOKENS = 5 + 7 + 2
VOCABULARY = 14


def make_criterion(draws: int = 0) -> MoECrossEntropy:
    return MoECrossEntropy(make_task(), sentence_avg=False, sampled_softmax=draws)


def all_classes(*_: object) -> ClassSample:
    """Draw every class with certainty, so that the sampled softmax equals the full one."""
    return ClassSample(torch.arange(VOCABULARY), torch.ones(VOCABULARY, dtype=torch.float64))


def test_the_loss_by_hand():
    model = without_noise(make_model(importance_weight=0.5, load_weight=0.5).train())
    loss, size, log = make_criterion()(model, SAMPLE)
    logits, extra = model(**SAMPLE["net_input"])
    target = SAMPLE["target"]
    nll = F.cross_entropy(logits[target != 1], target[target != 1], reduction="sum")
    balance = extra["moe_stats"]["decoder"].balance_loss
    assert size == NUM_TOKENS
    assert balance > 0
    torch.testing.assert_close(log["nll_loss"], nll)
    torch.testing.assert_close(loss, nll + NUM_TOKENS * balance)
    torch.testing.assert_close(log["balance_loss"], NUM_TOKENS * balance)


def test_with_all_classes_certain_the_sampled_loss_and_its_gradients_equal_the_full_ones():
    results = []
    for draws in (0, 5):
        model = without_noise(make_model().train())
        with mock.patch("nmt_moe.criterions.moe_cross_entropy.draw_classes", all_classes):
            loss, _, log = make_criterion(draws)(model, SAMPLE)
        loss.backward()
        results.append((log, {name: p.grad for name, p in model.named_parameters()}))
    (full, full_grads), (sampled, sampled_grads) = results
    assert sampled.keys() - full.keys() == {"sampled_softmax"}
    for key in ("loss", "nll_loss", "balance_loss"):
        torch.testing.assert_close(sampled[key], full[key])
    for name, grad in full_grads.items():
        torch.testing.assert_close(sampled_grads[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_proposal_begins_at_the_end_mark():
    seen = []

    def draw(*args: object) -> ClassSample:
        seen.append(args[:3])
        return all_classes()

    with mock.patch("nmt_moe.criterions.moe_cross_entropy.draw_classes", draw):
        make_criterion(5)(make_model().train(), SAMPLE)
    assert seen == [(5, VOCABULARY, 2)]  # one sample for the batch; the end mark is symbol 2


def test_sampling_happens_only_in_training_and_computes_no_full_logits():
    model, criterion = make_model().train(), make_criterion(3)
    with mock.patch.object(type(model.decoder), "output_layer") as output_layer:
        criterion(model, SAMPLE)
    output_layer.assert_not_called()
    model.eval()
    assert criterion(model, SAMPLE)[2]["nll_loss"] == make_criterion()(model, SAMPLE)[2]["nll_loss"]


def reduce_metrics(logs: list[dict]) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as aggregator:
        MoECrossEntropy.reduce_metrics(logs)
    return aggregator.get_smoothed_values()


def test_perplexity_is_free_of_the_balance():
    model = make_model(importance_weight=9.0).train()
    log = make_criterion()(model, SAMPLE)[2]
    values = reduce_metrics([log, log])
    bits = log["nll_loss"].item() / NUM_TOKENS / math.log(2)
    assert values["nll_loss"] == pytest.approx(bits, abs=1e-3)
    assert values["ppl"] == pytest.approx(2**bits, rel=1e-2)
    assert values["loss"] > values["nll_loss"]
    balance = log["balance_loss"].item() / NUM_TOKENS
    assert values["balance_loss"] == pytest.approx(balance, abs=1e-4)
    assert {"moe_cv_load", "decoder_moe_cv_load", "moe_max_load"} <= values.keys()


def test_ranks_log_equal_keys_and_shapes_so_that_logs_can_be_summed():
    assert MoECrossEntropy.logging_outputs_can_be_summed()
    model = make_model().train()
    one, other = (make_criterion(4)(model, sample)[2] for sample in (SAMPLE, make_sample("ab")))
    assert one.keys() == other.keys()
    summed = {key: one[key] + other[key] for key in one}
    assert reduce_metrics([summed]) == pytest.approx(reduce_metrics([one, other]))


def test_estimates_are_marked_with_the_number_of_draws():
    model = make_model()
    criterion = make_criterion(5)
    logs = [criterion(model.train(), sample)[2] for sample in (SAMPLE, make_sample("ab"))]
    assert reduce_metrics(logs)["sampled_softmax"] == 5
    assert "sampled_softmax" not in reduce_metrics([criterion(model.eval(), SAMPLE)[2]])
    assert "sampled_softmax" not in reduce_metrics([make_criterion()(model.train(), SAMPLE)[2]])


@pytest.mark.parametrize("draws", [-1, 15])
def test_more_draws_than_symbols_are_refused(draws: int):
    match = rf"`--sampled-softmax` must be from 0 to 14, .* but is {draws}\. Use a smaller number"
    with pytest.raises(ValueError, match=match):
        make_criterion(draws)


def test_the_softmax_of_another_kind_of_model_cannot_be_sampled():
    stranger = SimpleNamespace(training=True, decoder=SimpleNamespace())
    with pytest.raises(ValueError, match="`--sampled-softmax` must be 0, but is 3"):
        make_criterion(3)(stranger, SAMPLE)


def test_the_softmax_of_translation_can_be_sampled_too():
    model = make_translation().train()
    loss, _, log = make_criterion(5)(model, make_pairs(["abc"], ["dd"]))
    loss.backward()
    assert model.decoder.output.weight.grad.any()
    assert "encoder_moe_load" in log


def test_a_loss_that_is_not_a_number_names_its_sentences():
    model = make_model().train()
    nn.init.constant_(model.decoder.output.weight, math.nan)
    with pytest.raises(FloatingPointError, match=r"loss is NaN .* sentences \[0, 1, 2\].*`--lr`"):
        make_criterion()(model, SAMPLE)
