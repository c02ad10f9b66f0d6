"""The compiled loops for inference, compared with torch in float64."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from nmt_moe.kernels import (
    PackedLinear,
    PackedLSTM,
    attend_rows,
    choose_experts,
    has_compiled_loops,
    log_probabilities,
    log_softmax,
    sigmoid_residual,
    tanh,
)
from nmt_moe.kernels.quantised import make_panels

LOOPS = pytest.param(
    True,
    marks=pytest.mark.skipif(
        not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled"
    ),
)
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 25, 97, 200]
SIZES = [(1, 1), (7, 15), (33, 16), (64, 50), (20, 129)]


@pytest.fixture(params=[LOOPS, False])
def with_and_without_loops(request, monkeypatch):
    if not request.param:
        for name in ("attend_rows", "activations", "packed_mixture"):
            module = import_module(f"nmt_moe.kernels.{name}")
            monkeypatch.setattr(module, "has_compiled_loops", lambda *tensors: False)


def test_panels_hold_the_rows_of_the_weight():
    weight = torch.randn(2, 21, 5)
    panels = make_panels(weight)
    assert panels.shape == (2, 2, 5, 16)
    back = panels.mT.reshape(2, 32, 5)
    assert back[:, :21].equal(weight)
    assert not back[:, 21:].any()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("addend", [None, "row", "matrix"])
def test_products_do_not_depend_on_the_number_of_rows(sizes, addend):
    torch.manual_seed(1)
    inputs, outputs = sizes
    weight, x = torch.randn(outputs, inputs), torch.randn(max(ROWS), inputs)
    product = PackedLinear.pack(weight)
    added = {None: None, "row": torch.randn(outputs), "matrix": torch.randn(max(ROWS), outputs)}
    whole = product(x, added[addend])
    expected = x.double() @ weight.double().t()
    if addend is not None:
        expected += added[addend]
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-4)
    for rows in ROWS:
        own = added[addend][:rows] if addend == "matrix" else added[addend]
        part = product(x[:rows], own)
        if has_compiled_loops(x):
            assert part.equal(whole[:rows]), rows
        else:
            torch.testing.assert_close(part, whole[:rows], rtol=1e-5, atol=1e-4)


def test_mismatched_widths_are_refused():
    product = PackedLinear.pack(torch.randn(7, 9))
    with pytest.raises((ValueError, RuntimeError)):
        product(torch.randn(3, 8))
    with pytest.raises((ValueError, RuntimeError)):
        product(torch.randn(3, 9), torch.randn(2, 7))
    of_output = PackedLinear.pack(torch.randn(8, 2))
    lstm = PackedLSTM(PackedLinear.pack(torch.randn(8, 5), torch.randn(8)), of_output, None)
    with pytest.raises((ValueError, RuntimeError)):
        lstm.step(torch.randn(3, 4), *lstm.start(3))
    with pytest.raises((ValueError, RuntimeError)):
        lstm.step(torch.randn(3, 5), *lstm.start(2))


@pytest.mark.skipif(not has_compiled_loops(torch.zeros(1)), reason="the loops are not compiled")
def test_products_do_not_depend_on_the_number_of_threads():
    product, x = PackedLinear.pack(torch.randn(2100, 300)), torch.randn(900, 300)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append([product(x), product(x[:5])])
    finally:
        torch.set_num_threads(threads)
    for own in results[1:]:
        assert all(map(torch.equal, own, results[0]))


@pytest.mark.usefixtures("with_and_without_loops")
@pytest.mark.parametrize("is_product", [True, False])
@pytest.mark.parametrize("width", [5, 32, 70])
@pytest.mark.parametrize("sentences", [[0], [0, 0, 0], [0, 0, 1, 1], [0, 2, 2, 2]], ids=str)
def test_attention_is_that_of_the_paper(is_product, width, sentences):
    torch.manual_seed(1)
    num_sentences, length = max(sentences) + 1, 9
    query, scale = torch.randn(len(sentences), width), torch.randn(width)
    keys, source = torch.randn(2, num_sentences, length, width).unbind(0)
    padding = torch.arange(length) >= torch.tensor([9, 4, 1])[:num_sentences].unsqueeze(1)
    sentence = torch.tensor(sentences)
    own_keys = keys.double()[sentence]
    wide = query.double().unsqueeze(1)
    mixed = wide.tanh() * own_keys if is_product else torch.tanh(wide + own_keys)
    scores = (mixed * scale.double()).sum(2).masked_fill(padding[sentence], -torch.inf)
    weights = scores.softmax(dim=1)
    context = (weights.unsqueeze(2) * source.double()[sentence]).sum(1)
    found = attend_rows(query.clone(), scale, keys, source, padding, sentence, is_product)
    torch.testing.assert_close(found[0].double(), context, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1].double(), weights, rtol=0, atol=1e-6)
    assert not found[1][padding[sentence]].any()


@pytest.mark.usefixtures("with_and_without_loops")
def test_views_of_larger_tensors_are_accepted():
    torch.manual_seed(1)
    query, scale, keys = torch.randn(3, 2, 8)[:, 0], torch.randn(16)[::2], torch.randn(2, 5, 8)
    source, padding = torch.randn(5, 2, 8).transpose(0, 1), torch.zeros(5, 2, dtype=torch.bool).t()
    parts = query, scale, keys, source, padding, torch.tensor([0, 1, 1])
    found = attend_rows(*(part.clone() if part is query else part for part in parts), False)
    expected = attend_rows(*(part.contiguous().clone() for part in parts), False)
    assert all(map(torch.equal, found, expected))
    logits = torch.randn(4, 12)[:, ::2]
    assert choose_experts(logits, 2)[1].equal(choose_experts(logits.contiguous(), 2)[1])
    weight, x = torch.randn(7, 9), torch.randn(9, 4).t()
    product, addend = PackedLinear.pack(weight), torch.randn(7, 4).t()
    torch.testing.assert_close(product(x, addend), x @ weight.t() + addend)


@pytest.mark.usefixtures("with_and_without_loops")
@pytest.mark.parametrize("width", [1, 31, 32, 5001])
def test_log_probabilities_are_those_of_float64(width):
    torch.manual_seed(1)
    logits = torch.randn(6, width) * torch.tensor([0.1, 1, 3, 10, 30, 80]).unsqueeze(1)
    expected = logits.double().log_softmax(dim=1)
    torch.testing.assert_close(log_softmax(logits).double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.usefixtures("with_and_without_loops")
@pytest.mark.parametrize("position", [0, 20, 39])
def test_nan_spoils_only_its_own_row_of_log_probabilities(position):
    logits = torch.randn(2, 40)
    logits[0, position] = torch.nan
    is_nan = log_softmax(logits).isnan()
    assert is_nan[0].all()
    assert not is_nan[1].any()


@pytest.mark.usefixtures("with_and_without_loops")
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (40, 4), (300, 300)])
def test_the_experts_with_the_largest_logits_are_chosen(num_experts, top_k):
    torch.manual_seed(1)
    logits = torch.randint(-9, 9, (50, num_experts)) / 4.0
    gates, ids = choose_experts(logits, top_k)
    values, order = logits.sort(dim=1, descending=True, stable=True)
    assert ids.equal(order[:, :top_k])
    torch.testing.assert_close(gates, F.softmax(values[:, :top_k], dim=1))


@pytest.mark.usefixtures("with_and_without_loops")
def test_a_nan_logit_makes_its_gates_nan():
    logits = torch.zeros(1, 50)
    logits[0, 45] = torch.nan
    assert choose_experts(logits, 4)[0].isnan().all()


@pytest.mark.parametrize("level", ["default", "avx2"])
def test_the_loops_are_right_at_lower_instruction_levels(level):
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is the run at a lower level")
    tests = "panels or products or attention or float64 or experts"
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    subprocess.run(line, check=True, env=env, timeout=300, capture_output=True)


@pytest.mark.usefixtures("with_and_without_loops")
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 17), (5, 64)], ids=str)
def test_activations_are_those_of_float64(shape):
    torch.manual_seed(1)
    y, x = 3 * torch.randn(shape), torch.randn(shape)
    wide = y.double()
    torch.testing.assert_close(tanh(y.clone()).double(), wide.tanh(), rtol=3e-7, atol=1e-7)
    expected = wide.sigmoid() + x
    torch.testing.assert_close(sigmoid_residual(y.clone(), x).double(), expected, rtol=0, atol=5e-7)
    transposed = sigmoid_residual(y.clone().t(), x.t())
    torch.testing.assert_close(transposed.double(), expected.t(), rtol=0, atol=5e-7)


@pytest.mark.usefixtures("with_and_without_loops")
def test_activations_keep_infinities_and_nan():
    y = torch.tensor([[-torch.inf, torch.inf, torch.nan, 100.0, -100.0]])
    torch.testing.assert_close(tanh(y.clone()), y.tanh(), equal_nan=True)
    x = torch.ones(1, 5)
    expected = y.sigmoid() + 1
    torch.testing.assert_close(sigmoid_residual(y, x), expected, equal_nan=True)


@pytest.mark.parametrize("width", [16, 17, 24, 40])
def test_activations_do_not_depend_on_the_number_of_rows(width):
    if not has_compiled_loops(torch.zeros(1)):
        pytest.skip("the loops are not compiled")
    torch.manual_seed(1)
    y, x = torch.randn(9, width), torch.randn(9, width)
    tangents, sums = tanh(y.clone()), sigmoid_residual(y.clone(), x)
    for rows in range(1, 9):
        assert tanh(y[:rows].clone()).equal(tangents[:rows])
        assert sigmoid_residual(y[:rows].clone(), x[:rows]).equal(sums[:rows])


@pytest.mark.usefixtures("with_and_without_loops")
@pytest.mark.parametrize("rows", [0, 1, 5, 24, 25, 100])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_log_probabilities_of_a_softmax_layer(rows, dtype):
    torch.manual_seed(1)
    output, x = PackedLinear.pack(torch.randn(501, 20), dtype=dtype), torch.randn(100, 20)
    whole = log_softmax(output(x))
    part = log_probabilities(output, x[:rows])
    assert part.shape == (rows, 501)
    if has_compiled_loops(x):
        assert part.equal(whole[:rows])
    else:
        torch.testing.assert_close(part, whole[:rows])
