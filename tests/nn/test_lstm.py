"""LSTMs agree with their equations, and padding does not affect the results."""

import torch

from nmt_moe.nn import BidirectionalLSTM, ProjectedLSTM
from nmt_moe.nn.lstm import turned_positions


def lstm_by_hand(layer: ProjectedLSTM, x):
    """Compute the LSTM of Sak et al. 2014, without peepholes, for one sequence, (T, D)."""
    lstm = layer.lstm
    hidden, cell = x.new_zeros(lstm.weight_hh_l0.shape[1]), x.new_zeros(lstm.hidden_size)
    outputs = []
    for x_t in x:
        gates = lstm.weight_ih_l0 @ x_t + lstm.weight_hh_l0 @ hidden
        i, f, g, o = (gates + lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        hidden = lstm.weight_hr_l0 @ hidden if lstm.proj_size else hidden
        outputs.append(hidden)
    return torch.stack(outputs)


def test_projected_lstm_is_the_papers():
    torch.manual_seed(0)
    for hidden_dim in (7, 4):  # with a projection to 4, and without
        layer = ProjectedLSTM(5, hidden_dim, 4).double()
        x = torch.randn(6, 2, 5, dtype=torch.float64)
        out, (hidden, _) = layer(x)
        torch.testing.assert_close(out[:, 1], lstm_by_hand(layer, x[:, 1]))
        torch.testing.assert_close(hidden, out[-1])


def test_continuing_from_a_state_equals_one_run():
    torch.manual_seed(0)
    layer = ProjectedLSTM(5, 7, 4).double()
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    _, state = layer(x[:3])
    torch.testing.assert_close(layer(x[3:], state)[0], layer(x)[0][3:])


def test_turned_positions_by_hand():
    turned = turned_positions(torch.tensor([3, 1, 4]), 4).t()
    assert turned.tolist() == [[2, 1, 0, 3], [0, 1, 2, 3], [3, 2, 1, 0]]


def test_both_directions_see_only_their_own_sentence():
    torch.manual_seed(0)
    layer = BidirectionalLSTM(5, 7, 4).double()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 4])
    out = layer(x, lengths)
    for b, length in enumerate(lengths.tolist()):
        sentence = x[:length, b]
        backwards = lstm_by_hand(layer.backwards, sentence.flip(0)).flip(0)
        expected = lstm_by_hand(layer.forwards, sentence) + backwards
        torch.testing.assert_close(out[:length, b], expected)
