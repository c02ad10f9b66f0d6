"""The matrix products of gates, compared with plain products."""

import pytest
import torch

from nmt_moe.kernels import gate_logits


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("sizes", [None, [3, 0, 4], [0, 7, 0]])
def test_products_and_gradients(sizes, noisy):
    torch.manual_seed(0)
    shape = (5, 6) if sizes is None else (len(sizes), 5, 6)
    rows, gate_weight, noise_weight = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in ((7, 5), shape, shape)
    )
    offsets = None if sizes is None else torch.tensor([0, *sizes]).cumsum(0)
    weights = [gate_weight, noise_weight] if noisy else [gate_weight]
    ours = gate_logits(rows, gate_weight, noise_weight if noisy else None, offsets)
    assert noisy or ours[1] is None
    parts = rows.split(sizes or [7])
    expected = [
        torch.cat([part @ w for part, w in zip(parts, weight.view(-1, 5, 6), strict=True)])
        for weight in weights
    ]
    ours = ours[: len(weights)]
    torch.testing.assert_close(list(ours), expected)
    grads = [torch.randn(7, 6, dtype=torch.float64) for _ in weights]
    for used in (slice(None), slice(0, 1)):  # only one result may have a gradient
        one, other = (
            torch.autograd.grad(
                out[used],
                [rows, *weights],
                grads[used],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for out in (ours, expected)
        )
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate_weight": torch.zeros(4, 6)}, r"`gate_weight` .* \(D, E\) = \(5, any\)"),
        (
            {"gate_weight": torch.zeros(4, 6), "noise_weight": torch.zeros(4, 6)},
            r"`gate_weight` .* \(D, E\) = \(5, any\)",
        ),
        ({"noise_weight": torch.zeros(5, 7)}, r"`noise_weight` .* = \(1, 5, 6\)"),
    ],
)
def test_mismatched_shapes_are_refused(changed, message):
    arguments = {"rows": torch.zeros(3, 5), "gate_weight": torch.zeros(5, 6), "noise_weight": None}
    with pytest.raises(ValueError, match=message):
        gate_logits(**{**arguments, **changed})
