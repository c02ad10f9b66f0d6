"""Measures of gates and experts, worked out by hand and compared with their definitions."""

import math

import pytest
import torch
from torch.nn import functional as F

from nmt_moe.moe.routing import (
    expert_outputs,
    gate_entropy,
    gate_margin,
    output_similarity,
    routing_saturation,
)


def test_entropy_of_even_sharp_and_empty_rows():
    gates = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.0] * 4]).double()
    expected = torch.tensor([math.log(4), 0, math.log(2), 0]).double()
    torch.testing.assert_close(gate_entropy(gates), expected)


def test_the_margin_does_not_depend_on_the_order_of_slots():
    gates = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(gate_margin(gates), torch.tensor([0.2, 0.0, 1.0]).double())
    torch.testing.assert_close(gate_margin(gates[:, :1]), gates[:, 0])


def test_saturation_counts_pairs_in_any_order_and_ignores_empty_slots():
    before = torch.tensor([[0, 1], [2, 4], [3, 0]])
    after = torch.tensor([[1, 0], [1, 2], [4, 4]])  # 4 marks empty slots
    assert routing_saturation(before, after, 4) == pytest.approx(3 / 4)
    assert routing_saturation(before, before, 4) == 1
    assert routing_saturation(before[:0], after[:0], 4) == 0


def test_similarity_is_the_mean_cosine_of_all_pairs():
    torch.manual_seed(1)
    x = torch.randn(5, 6).double()
    weight_in, weight_out = torch.randn(4, 6, 8).double(), torch.randn(4, 8, 6).double()
    outputs = expert_outputs(x, weight_in, weight_out)
    cosines = [
        F.cosine_similarity(outputs[i, n], outputs[j, n], dim=0)
        for i in range(4)
        for j in range(i)
        for n in range(5)
    ]
    torch.testing.assert_close(output_similarity(outputs), torch.stack(cosines).mean())
    torch.testing.assert_close(outputs[2], F.relu(x @ weight_in[2]) @ weight_out[2])


def test_outputs_of_zero_are_left_out_of_the_similarity():
    outputs = torch.randn(1, 7, 4).double().repeat(3, 1, 1)
    outputs[0, 2] = outputs[1, 2] = outputs[2, 5] = 0
    assert output_similarity(outputs) == pytest.approx(1.0)
    outputs[1] = -outputs[1]
    cosines = [
        F.cosine_similarity(outputs[i, n], outputs[j, n], dim=0).item()
        for i, j in ((0, 1), (0, 2), (1, 2))
        for n in range(7)
        if outputs[i, n].any() and outputs[j, n].any()
    ]
    assert output_similarity(outputs) == pytest.approx(sum(cosines) / len(cosines))
    assert output_similarity(torch.zeros(2, 3, 4)) == 0


def test_copies_of_an_expert_are_alike_and_one_expert_is_refused():
    copies = torch.randn(1, 7, 4).double().expand(3, -1, -1)
    assert output_similarity(copies) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 2 experts .*, but has 1"):
        output_similarity(copies[:1])
