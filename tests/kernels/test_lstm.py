"""The outputs, last states and gradients of the fused LSTM, compared with torch's."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from nmt_moe.kernels import has_compiled_loops, lstm
from tests.support.kernels import poisoned_memory

pytestmark = [
    pytest.mark.skipif(not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
]

SHAPES = [  # steps, batch, input, cells, output
    pytest.param((5, 3, 4, 7, 6), id="projected"),
    pytest.param((5, 3, 4, 7, 7), id="not-projected"),
    pytest.param((1, 2, 4, 7, 6), id="one-step"),
    pytest.param((3, 1, 4, 40, 6), id="wider-than-a-vector"),
    pytest.param((6, 70, 32, 130, 33), id="several-threads"),
]


def make(shape, dtype) -> tuple[nn.LSTM, Tensor, tuple[Tensor, Tensor]]:
    steps, batch, input_dim, width, output_dim = shape
    torch.manual_seed(1)
    projection = output_dim if output_dim != width else 0
    layer = nn.LSTM(input_dim, width, proj_size=projection).to(dtype)
    x = torch.randn(steps, batch, input_dim, dtype=dtype).requires_grad_()
    hidden = torch.randn(batch, output_dim, dtype=dtype).requires_grad_()
    return layer, x, (hidden, torch.randn(batch, width, dtype=dtype).requires_grad_())


def run_fused(layer: nn.LSTM, x: Tensor, state) -> tuple[Tensor, Tensor, Tensor]:
    weight_hr = layer.weight_hr_l0 if layer.proj_size else None
    bias = layer.bias_ih_l0 + layer.bias_hh_l0
    out, cell = lstm(x, layer.weight_ih_l0, layer.weight_hh_l0, bias, weight_hr, state)
    return out, out[-1], cell


def run_torch(layer: nn.LSTM, x: Tensor, state) -> tuple[Tensor, Tensor, Tensor]:
    lifted = None if state is None else tuple(part.unsqueeze(0) for part in state)
    out, (hidden, cell) = layer(x, lifted)
    return out, hidden[0], cell[0]


@pytest.mark.parametrize("used", ["outputs", "states", "both"])
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_torchs(shape, dtype, tolerance, has_state, used):
    layer, x, state = make(shape, dtype)
    kept = state if has_state else None
    leaves = [x, *layer.parameters(), *(kept or ())]
    results = []
    for run in (run_fused, run_torch):
        with poisoned_memory():
            values = run(layer, x, kept)
            torch.manual_seed(2)
            chosen = values[1:] if used == "states" else values[:1] if used == "outputs" else values
            loss = sum((value * torch.randn_like(value)).sum() for value in chosen)
            results.append([*values, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_extreme_sums_saturate_and_nan_stays():
    layer, x, state = make((2, 3, 4, 7, 7), torch.float32)
    with torch.no_grad():
        for scale in (1e-3, 30.0, 1e4, 1e30):
            ours, theirs = run_fused(layer, x * scale, state), run_torch(layer, x * scale, state)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        x[0, 1, 0] = float("nan")
        out = run_fused(layer, x, state)[0]
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2]].isfinite().all()


def test_small_sums_keep_their_digits():
    """Check tanh near 0, where a quotient of exponentials would lose digits."""
    layer, x, state = make((1, 2, 4, 7, 7), torch.float32)
    with torch.no_grad():
        nn.init.zeros_(layer.bias_ih_l0)
        nn.init.zeros_(layer.bias_hh_l0)
        tiny = [part * 0 for part in state]
        ours, theirs = run_fused(layer, x * 1e-6, tiny)[0], run_torch(layer, x * 1e-6, tiny)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_a_subset_of_the_gradients_has_the_same_values():
    layer, x, _ = make(SHAPES[0].values[0], torch.float64)
    out = run_fused(layer, x, None)[0]
    (whole,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    (alone,) = torch.autograd.grad(run_fused(layer, x, None)[0].sum(), x)
    assert alone.equal(whole)
    assert torch.autograd.grad(out.sum(), x)[0].equal(whole)  # stored values are intact


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_inputs_give_equal_bits_on_any_number_of_threads(shape):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            layer, x, state = make(shape, torch.float32)
            values = run_fused(layer, x, state)
            results.append([*values, *torch.autograd.grad(values[0].sum(), [x, *state])])
    finally:
        torch.set_num_threads(before)
    for first, second in zip(results[0], results[1], strict=True):
        assert first.equal(second)
    for first, other in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(first, other)  # products may be divided differently


def test_the_variable_switches_the_loops_off():
    program = "import torch, nmt_moe.kernels as k; print(k.has_compiled_loops(torch.zeros(1)))"
    for choice, expected in (("torch", "False"), ("", "True")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"NMT_MOE_KERNELS": choice},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_tensors_are_left_to_torch(dtype):
    assert not has_compiled_loops(torch.zeros(2, dtype=dtype))
    assert not has_compiled_loops(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not has_compiled_loops(torch.zeros(2, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not has_compiled_loops(torch.zeros(2))
