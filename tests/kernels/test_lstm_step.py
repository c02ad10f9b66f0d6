"""LSTM cells with packed weights, compared with torch's."""

from importlib import import_module

import pytest
import torch
from torch import nn

from nmt_moe.kernels import PackedLinear, lstm_step

# Use import_module, because the package's attribute of that name is the function.
operation = import_module("nmt_moe.kernels.lstm_step")


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
@pytest.mark.parametrize("is_compiled", [True, False])
def test_steps_are_those_of_torch(projected, has_state, dtype, tolerance, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(operation, "has_compiled_loops", lambda *tensors: False)
    torch.manual_seed(1)
    lstm = nn.LSTM(10, 12, proj_size=projected)
    x = torch.randn(7, 3, 10)
    state = (torch.randn(1, 3, projected or 12).tanh(), torch.randn(1, 3, 12))
    expected, (hidden, cell) = lstm(x, state) if has_state else lstm(x)
    of_input, recurrent, projection = pack(lstm, dtype)
    start = (
        (state[0][0], state[1][0])
        if has_state
        else (x.new_zeros(3, projected or 12), x.new_zeros(3, 12))
    )
    out, own_cell = start
    for step, x_t in enumerate(x):
        out, own_cell = lstm_step(recurrent(out, of_input(x_t)), own_cell, projection)
        torch.testing.assert_close(out, expected[step], rtol=0, atol=tolerance)
    torch.testing.assert_close(out, hidden[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(own_cell, cell[0], rtol=0, atol=tolerance)
