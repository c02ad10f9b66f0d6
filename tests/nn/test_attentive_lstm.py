"""The compiled attentive LSTM, compared with torch's operations."""

import importlib

import pytest
import torch

from nmt_moe.kernels import has_compiled_loops
from nmt_moe.nn.encoder import EncoderOutput
from tests.support.kernels import poisoned_memory

module = importlib.import_module("nmt_moe.nn.attentive_lstm")

pytestmark = pytest.mark.skipif(
    not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled"
)

SHAPES = [  # steps, batch, positions, width, cells
    pytest.param((5, 3, 4, 6, 7), id="projected"),
    pytest.param((5, 3, 4, 6, 6), id="not-projected"),
    pytest.param((1, 2, 3, 6, 7), id="one-step"),
    pytest.param((4, 1, 1, 40, 33), id="one-position"),
    pytest.param((6, 70, 9, 66, 130), id="several-threads"),
]


def make(shape, dtype):
    steps, batch, positions, dim, width = shape
    torch.manual_seed(1)
    layer = module.AttentiveLSTM(dim, width, "product").to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)
    mask = torch.zeros(batch, positions, dtype=torch.bool)
    mask[1:, -1:] = positions > 1
    tensors = {
        "x": torch.randn(steps, batch, dim, dtype=dtype),
        "keys": torch.randn(batch, positions, dim, dtype=dtype).tanh(),
        "source": torch.randn(batch, positions, dim, dtype=dtype),
        "hidden": torch.randn(batch, dim, dtype=dtype),
        "cell": torch.randn(batch, width, dtype=dtype),
    }
    return layer, mask, {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def run(layer, mask, tensors, has_state=True):
    encoded = EncoderOutput(
        tensors["source"], tensors["keys"], mask, torch.arange(len(mask)), moe_stats=None
    )
    state = (tensors["hidden"], tensors["cell"]) if has_state else None
    outputs, weights, (hidden, cell) = layer(tensors["x"], encoded, state)
    return {"outputs": outputs, "weights": weights, "hidden": hidden, "cell": cell}


def gradients(layer, mask, tensors, used, has_state=True):
    with poisoned_memory():
        values = run(layer, mask, tensors, has_state)
        torch.manual_seed(2)
        loss = sum(
            (values[name] * torch.randn(values[name].shape, dtype=values[name].dtype)).sum()
            for name in used
        )
        leaves = {**tensors, **dict(layer.named_parameters())}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return values, dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize(
    "used", [["outputs"], ["weights", "cell"], ["outputs", "weights", "hidden"]]
)
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_torchs_operations(
    shape, dtype, tolerance, has_state, used, monkeypatch
):
    made = make(shape, dtype)
    ours, our_gradients = gradients(*made, used, has_state)
    monkeypatch.setattr(module, "has_compiled_loops", lambda *tensors: False)
    theirs, their_gradients = gradients(*made, used, has_state)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)
    for name, value in their_gradients.items():
        one = our_gradients[name]
        if value is None or one is None:  # this value does not affect the loss
            assert all(not other.count_nonzero() for other in (one, value) if other is not None)
            continue
        torch.testing.assert_close(
            one,
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_padding_gets_no_weight_and_changes_nothing():
    layer, mask, tensors = make(SHAPES[0].values[0], torch.float32)
    with torch.no_grad():
        before = run(layer, mask, tensors)
        tensors["keys"][mask] = 1e30
        tensors["source"][mask] = -7.0
        after = run(layer, mask, tensors)
    assert before["weights"][1:, :, -1].count_nonzero() == 0
    for name, value in before.items():
        assert value.equal(after[name]), name


def test_runs_repeat_bit_for_bit():
    layer, mask, tensors = make(SHAPES[-1].values[0], torch.float32)
    first, second = (gradients(layer, mask, tensors, ["outputs", "weights"]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            assert value.equal(other[name]), name
