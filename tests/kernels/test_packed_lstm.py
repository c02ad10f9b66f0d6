"""LSTMs with packed weights, compared with torch's."""

from importlib import import_module

import pytest
import torch
from torch import nn

from nmt_moe.kernels import PackedLinear, PackedLSTM

operation = import_module("nmt_moe.kernels.packed_lstm")
quantised = import_module("nmt_moe.kernels.quantised")


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    """Use compiled loops if there are any, or torch's own operations."""
    if request.param == "torch":
        monkeypatch.setattr(operation, "has_compiled_loops", lambda *tensors: False)
        monkeypatch.setattr(quantised, "load", lambda: None)


def pack(lstm: nn.LSTM, dtype: str) -> PackedLSTM:
    weights = dict(lstm.named_parameters())
    bias = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).detach()
    projection = weights.get("weight_hr_l0")
    return PackedLSTM(
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
@pytest.mark.usefixtures("loops")
def test_steps_are_those_of_torch(projected, has_state, dtype, tolerance):
    torch.manual_seed(1)
    lstm = nn.LSTM(10, 12, proj_size=projected)
    x = torch.randn(7, 3, 10)
    state = (torch.randn(1, 3, projected or 12).tanh(), torch.randn(1, 3, 12))
    expected, (hidden, cell) = lstm(x, state) if has_state else lstm(x)
    packed = pack(lstm, dtype)
    out, own_cell = (state[0][0], state[1][0]) if has_state else packed.start(3)
    for step, x_t in enumerate(x):
        out, own_cell = packed.step(x_t, out, own_cell)
        torch.testing.assert_close(out, expected[step], rtol=0, atol=tolerance)
    torch.testing.assert_close(out, hidden[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(own_cell, cell[0], rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("projected", [0, 6])
@pytest.mark.parametrize("lengths", [[7], [7, 7, 7], [7, 4, 4, 1]])
@pytest.mark.usefixtures("loops")
def test_whole_sentences_are_those_of_torch(projected, lengths):
    torch.manual_seed(1)
    lstm = nn.LSTM(10, 12, proj_size=projected)
    x = torch.randn(7, len(lengths), 10)
    outputs = pack(lstm, "float32").run(x, lengths)
    for number, length in enumerate(lengths):
        expected, _ = lstm(x[:length, number : number + 1])
        torch.testing.assert_close(outputs[:length, number], expected[:, 0], rtol=0, atol=1e-6)
        assert not outputs[length:, number].any()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("projected", [0, 6])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("num_rows", [1, 5, 250])
@pytest.mark.usefixtures("loops")
def test_hypotheses_continue_from_the_states_of_their_parents(projected, dtype, num_rows):
    torch.manual_seed(1)
    packed = pack(nn.LSTM(10, 12, proj_size=projected), dtype)
    x = torch.randn(num_rows, 10)
    output, cell = torch.randn(7, projected or 12), torch.randn(7, 12)
    parents = torch.randint(7, (num_rows,))
    found = packed.step(x, output, cell, parents)
    expected = packed.step(x, output[parents], cell[parents])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        if operation.has_compiled_loops(x) and dtype == "float32":
            assert one.equal(other)


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 5, 250])
@pytest.mark.usefixtures("loops")
def test_inputs_may_be_read_from_a_table(num_rows):
    torch.manual_seed(1)
    packed = pack(nn.LSTM(10, 12), "float32")
    embedding, tokens = torch.randn(30, 10), torch.randint(30, (num_rows,))
    output, cell = torch.randn(num_rows, 12), torch.randn(num_rows, 12)
    table = packed.of_input(embedding)
    found = packed.step_tokens(table, tokens, output, cell)
    for one, other in zip(found, packed.step(embedding[tokens], output, cell), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        if operation.has_compiled_loops(embedding):
            assert one.equal(other)


@pytest.mark.parametrize("wrong", [-4, 3])
def test_numbers_out_of_range_are_rejected(wrong):
    packed = pack(nn.LSTM(10, 12), "float32")
    table, tokens = torch.randn(3, 48), torch.tensor([0, wrong])
    output, cell = torch.randn(3, 12), torch.randn(3, 12)
    with pytest.raises(IndexError):
        packed.step_tokens(table, torch.tensor([wrong]), output[:1], cell[:1])
    with pytest.raises(IndexError):
        packed.step(torch.randn(2, 10), output, cell, tokens)
