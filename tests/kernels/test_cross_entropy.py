"""The fused cross-entropy, compared with torch's."""

import pytest
import torch
from torch.nn import functional as F

from nmt_moe.kernels import cross_entropy, has_compiled_loops
from tests.support.kernels import poisoned_memory

pytestmark = pytest.mark.skipif(
    not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled"
)
IGNORED = 1


def make(rows: int, classes: int, dtype, scale: float = 1.0):
    torch.manual_seed(1)
    logits = (torch.randn(rows, classes, dtype=dtype) * scale).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    target[::3] = IGNORED
    return logits, target


def in_torch(logits, target):
    log_probs = logits.log_softmax(1)
    nll = F.nll_loss(log_probs, target, reduction="none", ignore_index=IGNORED)
    return nll, -log_probs.sum(1).masked_fill(target == IGNORED, 0.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (5, 33), (300, 1000)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_values_and_gradients_are_torchs(dtype, tolerance, shape, scale):
    logits, target = make(*shape, dtype, scale)
    weights = torch.randn(2, len(target), dtype=dtype)
    with poisoned_memory():
        ours = cross_entropy(logits, target, IGNORED)
        theirs = in_torch(logits, target)
        grads = [
            torch.autograd.grad((torch.stack(sums) * weights).sum(), logits)[0]
            for sums in (ours, theirs)
        ]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * shape[1])
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance * shape[1])


def test_each_of_the_two_sums_has_its_own_gradient():
    logits, target = make(6, 40, torch.float64)
    for index in range(2):
        (ours,) = torch.autograd.grad(cross_entropy(logits, target, IGNORED)[index].sum(), logits)
        (theirs,) = torch.autograd.grad(in_torch(logits, target)[index].sum(), logits)
        torch.testing.assert_close(ours, theirs)


def test_infinities_and_nan():
    logits = torch.tensor([[0.0, float("-inf"), 2.0], [1e4, 0.0, -1e4], [0.0, float("nan"), 1.0]])
    nll, _ = cross_entropy(logits, torch.tensor([2, 0, 0]), 1)
    expected = F.cross_entropy(logits, torch.tensor([2, 0, 0]), reduction="none")
    torch.testing.assert_close(nll, expected, equal_nan=True)


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_that_is_not_a_class_is_refused(target):
    with pytest.raises(IndexError, match=rf"from 0 to 4, or 1 for an ignored row, but is {target}"):
        cross_entropy(torch.zeros(1, 5), torch.tensor([target]), 1)


def test_equal_inputs_give_equal_bits_on_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            logits, target = make(300, 1000, torch.float32)
            nll, smooth = cross_entropy(logits, target, IGNORED)
            results.append([nll, smooth, *torch.autograd.grad((nll + smooth).sum(), logits)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(one.equal(two) for one, two in zip(results[0], other, strict=True))
