"""The sampled softmax, proved unbiased by enumerating all possible samples."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.training import ClassSample, draw_classes, sampled_nll
from nmt_moe.training.sampled_softmax import log_uniform_probability

V, D = 4, 3


def make_problem(num_tokens: int = 5, num_classes: int = V, dim: int = D) -> tuple[Tensor, ...]:
    """Return (N, D) features and (V, D) weights, which require gradients, and (N,) targets."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    target = torch.arange(num_tokens) % num_classes
    return draw(num_tokens, dim), draw(num_classes, dim), target


def all_samples(num_draws: int) -> list[tuple[float, ClassSample]]:
    """Return every possible sample from V classes, with its probability."""
    p = log_uniform_probability(torch.arange(V), V)
    samples = []
    for draws in itertools.product(range(V), repeat=num_draws):
        ids = torch.tensor(sorted(set(draws)))
        expected = 1 - (1 - p[ids]) ** num_draws
        samples.append((math.prod(p[list(draws)].tolist()), ClassSample(ids, expected)))
    assert sum(chance for chance, _ in samples) == pytest.approx(1.0)
    return samples


def expected_loss(features: Tensor, weight: Tensor, target: Tensor, num_draws: int) -> Tensor:
    """Average the estimated loss over all possible samples."""
    losses = [
        chance * sampled_nll(features, weight, target, sample).mean()
        for chance, sample in all_samples(num_draws)
    ]
    return torch.stack(losses).sum()


# The proposal


def test_the_proposal_by_hand():
    # The chances are log(2/1), log(3/2) and log(4/3), each divided by log(4). The first is 1/2.
    p = log_uniform_probability(torch.arange(3), 3)
    wanted = torch.tensor([2 / 1, 3 / 2, 4 / 3], dtype=torch.float64).log() / math.log(4)
    torch.testing.assert_close(p, wanted)
    assert p[0] == pytest.approx(0.5)
    assert log_uniform_probability(torch.arange(100_000), 100_000).sum() == pytest.approx(1.0)


def test_ranks_of_classes_start_at_the_most_frequent_class_and_wrap_around():
    torch.manual_seed(1)
    # All 6 classes are drawn eventually. By ascending rank, their ids are 2, 3, 4, 5, 0, 1.
    sample = max((draw_classes(6, 6, 2) for _ in range(400)), key=lambda drawn: len(drawn.ids))
    assert sample.ids.tolist() == [2, 3, 4, 5, 0, 1]
    p = log_uniform_probability(torch.arange(6), 6)
    torch.testing.assert_close(sample.expected_count, 1 - (1 - p) ** 6)


def test_classes_are_drawn_as_often_as_expected():
    torch.manual_seed(1)
    rounds, num_classes, num_draws = 2000, 12, 5
    counts = torch.zeros(num_classes)
    expected = torch.full((num_classes,), math.nan, dtype=torch.float64)
    for _ in range(rounds):
        sample = draw_classes(num_draws, num_classes)
        counts[sample.ids] += 1
        expected[sample.ids] = sample.expected_count
    deviation = (expected * (1 - expected) / rounds).sqrt()
    assert ((counts / rounds - expected).abs() < 4 * deviation).all()


def test_a_vocabulary_of_one_class_is_always_drawn():
    sample = draw_classes(1, 1)
    assert sample.ids.tolist() == [0]
    assert sample.expected_count.tolist() == [1.0]


def test_equal_seeds_draw_equal_classes():
    samples = []
    for _ in range(2):
        torch.manual_seed(7)
        samples.append(draw_classes(50, 1000).ids.tolist())
    assert samples[0] == samples[1] == sorted(set(samples[0]))


@pytest.mark.parametrize("num_draws", [0, 11])
def test_more_draws_than_classes_are_refused(num_draws: int):
    with pytest.raises(ValueError, match=rf"`num_draws` must be from 1 to 10, but is {num_draws}"):
        draw_classes(num_draws, 10)


# The loss


def test_the_loss_by_hand():
    # The logits are 0, log 2, log 3 and log 4, and the target is 0. The classes 1 (chance 1/2) and
    # 3 (chance 1/4) are drawn, so Z^ = 1 + 2 / (1/2) + 4 / (1/4) = 21.
    weight = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).log()
    sample = ClassSample(torch.tensor([1, 3]), torch.tensor([0.5, 0.25]))
    nll = sampled_nll(torch.ones(1, 1), weight, torch.tensor([0]), sample)
    torch.testing.assert_close(nll, torch.tensor([21.0]).log())


def test_an_accidental_hit_counts_only_for_other_tokens():
    weight = torch.tensor([[1.0], [2.0], [3.0]]).log()
    sample = ClassSample(torch.tensor([1]), torch.tensor([0.5]))
    nll = sampled_nll(torch.ones(2, 1), weight, torch.tensor([1, 2]), sample)
    # The target of token 0 is in the sample, so Z^ = 2 and the loss is log(2 / 2). For token 1, the
    # loss is log((3 + 4) / 3).
    torch.testing.assert_close(nll, torch.tensor([1.0, 7 / 3]).log())


def test_with_all_classes_certain_the_loss_and_its_gradients_are_those_of_the_full_softmax():
    features, weight, target = make_problem()
    sample = ClassSample(torch.arange(V), torch.ones(V, dtype=torch.float64))
    nll = sampled_nll(features, weight, target, sample)
    full = F.cross_entropy(features @ weight.t(), target, reduction="none")
    torch.testing.assert_close(nll, full)
    grads = [torch.autograd.grad(loss.sum(), (features, weight)) for loss in (nll, full)]
    for name, one, other in zip(("features", "weight"), *grads, strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("num_draws", [1, 2, 3])
def test_the_partition_sum_and_its_gradient_are_unbiased(num_draws: int):
    # The mean over all samples, weighted by their probabilities, is exact.
    features, weight, target = make_problem()
    logits = features @ weight.t()
    target_logit = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    estimates = [
        chance * (sampled_nll(features, weight, target, sample) + target_logit).exp()
        for chance, sample in all_samples(num_draws)
    ]
    mean, partition = torch.stack(estimates).sum(0), logits.exp().sum(1)
    torch.testing.assert_close(mean, partition)
    inputs = features, weight
    grads = [torch.autograd.grad(z.sum(), inputs, retain_graph=True) for z in (mean, partition)]
    for name, one, other in zip(("features", "weight"), *grads, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_the_loss_is_too_low_and_its_bias_falls_at_least_as_fast_as_one_over_draws():
    features, weight, target = make_problem()
    full = F.cross_entropy(features @ weight.t(), target)
    wanted = torch.autograd.grad(full, (features, weight))
    loss_bias, grad_bias = [], []
    for num_draws in (1, 2, 4):
        loss = expected_loss(features, weight, target, num_draws)
        grads = torch.autograd.grad(loss, (features, weight))
        loss_bias.append((full - loss).item())
        grad_bias.append(
            sum((a - b).square().sum() for a, b in zip(grads, wanted, strict=True)).sqrt().item()
        )
    assert min(loss_bias) > 0  # by Jensen's inequality
    for bias in (loss_bias, grad_bias):
        assert bias[1] < 0.75 * bias[0]
        assert bias[2] < 0.5 * bias[1]


def test_divided_by_the_true_partition_sum_the_gradient_is_that_of_the_full_softmax():
    # Because d log Z = dZ / Z, the gradient d Z^ / Z is unbiased. Its mean over random samples
    # agrees within the standard error.
    torch.manual_seed(1)
    features, weight, target = make_problem(num_tokens=8, num_classes=60, dim=4)
    weight = weight.detach() * 0.5
    logits = features @ weight.t()
    full = F.cross_entropy(logits, target, reduction="sum")
    wanted = torch.autograd.grad(full, features, retain_graph=True)[0]
    target_logit = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    partition = logits.detach().exp().sum(1)
    rounds, grads = 1500, []
    for _ in range(rounds):
        nll = sampled_nll(features, weight, target, draw_classes(20, 60))
        loss = (nll + target_logit).exp() / partition - target_logit
        grads.append(torch.autograd.grad(loss.sum(), features, retain_graph=True)[0])
    mean, deviation = torch.stack(grads).mean(0), torch.stack(grads).std(0) / rounds**0.5
    assert ((mean - wanted).abs() < 4 * deviation).all()
    assert (deviation < 0.05 * wanted.norm()).all()


def test_half_precision_inputs_are_summed_in_float32():
    features, weight, target = (t.detach() for t in make_problem())
    sample = ClassSample(torch.tensor([0, 2]), torch.tensor([0.9, 0.4]))
    nll = sampled_nll(features.bfloat16(), weight.bfloat16(), target, sample)
    assert nll.dtype == torch.float32
    exact = sampled_nll(features, weight, target, sample)
    torch.testing.assert_close(nll.double(), exact, atol=0.05, rtol=0)


def test_without_tokens_the_loss_and_its_gradient_are_zero():
    weight = torch.randn(V, D, requires_grad=True)
    sample = draw_classes(3, V)
    nll = sampled_nll(torch.zeros(0, D), weight, torch.zeros(0, dtype=torch.long), sample)
    nll.sum().backward()
    assert nll.shape == (0,)
    assert weight.grad.abs().sum() == 0


def test_gradients_agree_with_finite_differences():
    features, weight, target = make_problem()
    sample = ClassSample(torch.tensor([0, 3]), torch.tensor([0.8, 0.3], dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda f, w: sampled_nll(f, w, target, sample), (features, weight)
    )
