"""Helpers for the tests of noisy top-k gating."""

import pytest
import torch
from torch import Tensor

from nmt_moe.kernels import Gating, noisy_top_k, reference

# The names of the tensors in a result.
FIELDS = Gating._fields[:5]

SHAPES = [  # (rows, experts, experts per token, sizes of groups)
    pytest.param(7, 4, 2, None, id="the-usual-case"),
    pytest.param(33, 7, 3, None, id="nothing-is-a-power-of-two"),
    pytest.param(5, 6, 1, None, id="one-expert-a-token"),
    pytest.param(5, 6, 5, None, id="all-but-one"),
    pytest.param(5, 6, 6, None, id="all-experts"),
    pytest.param(3, 1, 1, None, id="a-single-expert"),
    pytest.param(70, 40, 4, [30, 0, 39, 1], id="groups-some-without-rows"),
    pytest.param(9, 5, 2, [0, 9, 0], id="one-group-takes-all"),
]


def offsets_of(sizes: list[int] | None) -> Tensor | None:
    return None if sizes is None else torch.tensor([0, *sizes]).cumsum(0)


def make_inputs(rows: int, experts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make logits, noise and row weights, with equal values within each of the first two rows."""
    torch.manual_seed(1)
    clean, raw_scale, noise = (torch.randn(rows, experts, dtype=dtype) for _ in range(3))
    for tensor in (clean, raw_scale, noise):
        tensor[:2] = tensor[:2, :1]
    weight = torch.rand(rows, dtype=dtype)
    leaves = {"clean": clean, "raw_scale": raw_scale, "row_weight": weight}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()} | {"noise": noise}


def assert_is_the_definition(
    inputs: dict[str, Tensor],
    top_k: int,
    sizes: list[int] | None,
    training: bool,
    one_by_one: bool = True,
    **tolerance: float,
):
    """Compare results, and the gradients of all and of single results, with the definition's."""
    keywords = inputs | {"row_offsets": offsets_of(sizes), "top_k": top_k}
    if not training:
        keywords["raw_scale"] = None
    ours, theirs = noisy_top_k(**keywords), reference.noisy_top_k(**keywords)
    for name, one, other in zip(FIELDS, ours[:5], theirs[:5], strict=True):
        assert_close(name, one, other, **tolerance)
        assert one.requires_grad == other.requires_grad, name
    smooth = [name for name in FIELDS if getattr(ours, name).requires_grad]
    leaves = {name: x for name, x in keywords.items() if name in inputs and name != "noise"}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    for fields in (smooth, ["gates"], ["importance"]) if one_by_one else (smooth,):
        weights = [torch.randn_like(getattr(theirs, name)) for name in fields]
        gradients = [
            torch.autograd.grad(
                [getattr(out, name) for name in fields],
                list(leaves.values()),
                weights,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for out in (ours, theirs)
        ]
        for name, one, other in zip(leaves, *gradients, strict=True):
            assert_close(f"gradient of {fields} with respect to {name}", one, other, **tolerance)


def assert_infinite_logits_are_right():
    """Compare with the definition for logits of -inf with noise, and check that results are finite.

    Each row has one to five finite logits, and three experts are chosen, so that none, one or both
    of the thresholds are -inf.
    """
    inputs = make_inputs(10, 40, torch.float32)
    clean, raw_scale = (inputs[name].detach().clone() for name in ("clean", "raw_scale"))
    num_finite = torch.arange(10).unsqueeze(1) % 5 + 1
    clean[torch.arange(40) >= num_finite] = -torch.inf
    results = []
    for function in (noisy_top_k, reference.noisy_top_k):
        leaves = clean.clone().requires_grad_(), raw_scale.clone().requires_grad_()
        out = function(*leaves, 3, inputs["noise"])
        loss = (out.gates * torch.arange(3)).sum() + out.importance.square().sum()
        grads = torch.autograd.grad(loss + out.load.square().sum(), leaves)
        results.append((*out[:5], *grads))
    for name, one, other in zip((*FIELDS, "clean grad", "raw_scale grad"), *results, strict=True):
        assert other.isfinite().all(), name
        assert_close(name, one, other, rtol=1e-4, atol=1e-5)
    _assert_few_finite_logits_are_certain(clean, raw_scale, inputs["noise"])
    _assert_rows_without_a_largest_logit_are_nan(clean, raw_scale)


def _assert_few_finite_logits_are_certain(clean: Tensor, raw_scale: Tensor, noise: Tensor):
    """Check rows with at most k finite logits: these are always chosen, and -inf never is."""
    few = clean.isfinite().sum(1) <= 3
    load = noisy_top_k(clean[few], raw_scale[few], 3, noise[few]).load
    expected = clean[few].isfinite().sum(0).float()  # eq. 10 sums P(x, i) over tokens
    assert_close("load", load, expected, rtol=0, atol=1e-6)


def _assert_rows_without_a_largest_logit_are_nan(clean: Tensor, raw_scale: Tensor):
    """Check that a softmax over infinities makes its row and the importance NaN, not other rows."""
    spoilt = clean.clone()
    spoilt[1] = -torch.inf
    spoilt[4, 7] = torch.inf
    for scale in (raw_scale, None):
        out = noisy_top_k(spoilt, scale, 3)
        assert out.gates.isnan().all(1).tolist() == [row in (1, 4) for row in range(len(spoilt))]
        assert not out.gates[[0, 2, 3]].isnan().any()
        assert not out.importance.isfinite().all()


def assert_close(name: str, one: Tensor, other: Tensor, **tolerance: float):
    torch.testing.assert_close(one, other, msg=lambda text: f"{name}: {text}", **tolerance)
