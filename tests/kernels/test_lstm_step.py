"""LSTM cells of packed weights, against torch's."""

import pytest
import torch
from torch import nn

from nmt_moe.kernels import PackedLinear, lstm_sequence, lstm_step


def pack(lstm: nn.LSTM, dtype: str) -> tuple[PackedLinear, PackedLinear, PackedLinear | None]:
    weights = dict(lstm.named_parameters())
    bias = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).detach()
    projection = weights.get("weight_hr_l0")
    return (
        PackedLinear.pack(weights["weight_ih_l0"], bias, dtype),
        PackedLinear.pack(weights["weight_hh_l0"], None, dtype),
        None if projection is None else PackedLinear.pack(projection, None, dtype),
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("projected", [0, 6])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("int8", 5e-2)]
)
def test_a_sequence_is_that_of_torch(projected, has_state, dtype, tolerance):
    torch.manual_seed(1)
    lstm = nn.LSTM(10, 12, proj_size=projected)
    x = torch.randn(7, 3, 10)
    state = (torch.randn(1, 3, projected or 12).tanh(), torch.randn(1, 3, 12))
    expected, (hidden, cell) = lstm(x, state) if has_state else lstm(x)
    of_input, recurrent, projection = pack(lstm, dtype)
    start = (state[0][0], state[1][0]) if has_state else (None, None)
    found = lstm_sequence(of_input(x), recurrent, projection, *start)
    for ours, theirs in zip(found, (expected, hidden[0], cell[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@torch.no_grad()
def test_one_step_is_a_sequence_of_one():
    torch.manual_seed(1)
    lstm = nn.LSTM(10, 12, proj_size=6)
    x, hidden, cell = torch.randn(1, 3, 10), torch.randn(3, 6), torch.randn(3, 12)
    of_input, recurrent, projection = pack(lstm, "float32")
    expected, _, expected_cell = lstm_sequence(of_input(x), recurrent, projection, hidden, cell)
    out, new_cell = lstm_step(of_input(x[0]) + recurrent(hidden), cell, projection)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(new_cell, expected_cell)


def test_a_sequence_of_no_steps_returns_its_state():
    recurrent = PackedLinear.pack(torch.ones(8, 2))
    outputs, hidden, cell = lstm_sequence(torch.empty(0, 3, 8), recurrent)
    assert outputs.shape == (0, 3, 2)
    assert torch.equal(hidden, torch.zeros(3, 2))
    assert torch.equal(cell, torch.zeros(3, 2))
