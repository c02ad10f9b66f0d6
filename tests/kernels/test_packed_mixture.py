"""The mixture of packed experts equals its definition, and unused experts are not read."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from nmt_moe.kernels import (
    PackedExperts,
    has_compiled_loops,
    mixture_ffn,
    packed_mixture_ffn,
    plan_rows,
    quantise_rows,
    quantised,
)
from tests.support.kernels import poisoned_memory

packed_mixture = import_module("nmt_moe.kernels.packed_mixture")
NUM_EXPERTS, DIM, HIDDEN = 7, 16, 24
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 6e-2}


def draw(tokens: int, top_k: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    expert_ids = torch.rand(tokens, NUM_EXPERTS).argsort(1)[:, :top_k]
    return (
        torch.randn(tokens, DIM),
        torch.rand(tokens, top_k),
        expert_ids,
        torch.randn(NUM_EXPERTS, DIM, HIDDEN) * DIM**-0.5,
        torch.randn(NUM_EXPERTS, HIDDEN, DIM) * HIDDEN**-0.5,
    )


@pytest.fixture(params=["compiled", "stacked", "one-by-one"])
def way(request, monkeypatch):
    """Multiply small experts with compiled loops, with torch's grouped product, or one by one."""
    if request.param == "compiled":
        if not has_compiled_loops(torch.zeros(1)):
            pytest.skip("the loops are not compiled")
        return request.param
    monkeypatch.setattr(packed_mixture, "load", lambda: None)
    if request.param == "one-by-one":
        monkeypatch.setattr(packed_mixture, "loops_in_torch", lambda *tensors: False)
    return request.param


@pytest.mark.parametrize("dtype", quantised.DTYPES)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (5, 4), (90, 3), (0, 2)])
def test_the_packed_mixture_equals_the_one_used_in_training(tokens, top_k, dtype, way):
    x, gates, expert_ids, weight_in, weight_out = draw(tokens, top_k)
    if tokens > 2:  # one token has an empty slot, and another has only empty slots
        expert_ids[0, -1], gates[0, -1] = NUM_EXPERTS, 0
        expert_ids[1], gates[1] = NUM_EXPERTS, 0
    expected = mixture_ffn(x, gates, plan_rows(expert_ids, NUM_EXPERTS), weight_in, weight_out)
    packed = [PackedExperts.pack(weight.mT, dtype) for weight in (weight_in, weight_out)]
    with poisoned_memory():
        y = packed_mixture_ffn(x, gates, expert_ids, *packed)
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE[dtype])


def test_quantised_experts_of_a_file_are_those_quantised_here():
    x, gates, expert_ids, weight_in, weight_out = draw(6, 3)
    here = [PackedExperts.pack(weight.mT, "int8") for weight in (weight_in, weight_out)]
    stored = [
        PackedExperts.from_int8(*quantise_rows(weight.mT)) for weight in (weight_in, weight_out)
    ]
    assert torch.equal(
        packed_mixture_ffn(x, gates, expert_ids, *here),
        packed_mixture_ffn(x, gates, expert_ids, *stored),
    )


@pytest.mark.parametrize("dtype", quantised.DTYPES)
def test_an_expert_is_checked_once_before_its_first_use(dtype, way):
    x, gates, _, weight_in, weight_out = draw(2, 2)
    checked = []
    packed_in = PackedExperts.pack(weight_in.mT, dtype, checked.append)
    packed_out = PackedExperts.pack(weight_out.mT, dtype)
    for expert_ids in ([[0, 5], [5, NUM_EXPERTS]], [[5, 0], [6, 0]]):
        packed_mixture_ffn(x, gates, torch.tensor(expert_ids), packed_in, packed_out)
    # The compiled loops copy all experts, so they check all; int8 experts are packed one by one.
    are_copied = way == "compiled" and dtype != "int8"
    assert checked == (list(range(NUM_EXPERTS)) if are_copied else [0, 5, 6])

    def reject(expert: int) -> None:
        if expert == 3:
            raise ValueError(f"expert {expert}")

    packed_in = PackedExperts.pack(weight_in.mT, dtype, reject)
    with pytest.raises(ValueError, match="expert 3"):
        packed_mixture_ffn(x, gates, torch.full((2, 2), 3), packed_in, packed_out)


@pytest.mark.parametrize("dtype", quantised.DTYPES)
def test_only_experts_with_tokens_are_packed(dtype):
    x, gates, _, weight_in, weight_out = draw(4, 2)
    weight_in[3], weight_out[3] = float("nan"), float("nan")  # int8 would reject NaN
    expert_ids = torch.tensor([[0, 5], [5, 6], [0, 5], [6, 0]])
    packed = [PackedExperts.pack(weight.mT, dtype) for weight in (weight_in, weight_out)]
    assert packed_mixture_ffn(x, gates, expert_ids, *packed).isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_unused_experts_of_a_mapped_file_are_not_read_into_memory(dtype, tmp_path):
    num_experts, hidden, dim = 8, 1024 * 4 // dtype.itemsize, 1024
    path = tmp_path / "experts"
    numel = 2 * num_experts * hidden * dim
    torch.ones(numel, dtype=dtype).numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=numel, dtype=dtype)
    weight_in = mapped[: numel // 2].view(num_experts, hidden, dim)
    weight_out = mapped[numel // 2 :].view(num_experts, dim, hidden)
    if dtype == torch.int8:
        scales = torch.ones(num_experts, hidden), torch.ones(num_experts, dim)
        packed = [
            PackedExperts.from_int8(weight, scale)
            for weight, scale in zip((weight_in, weight_out), scales, strict=True)
        ]
    else:
        packed = [PackedExperts.pack(weight) for weight in (weight_in, weight_out)]
    packed_mixture_ffn(torch.ones(1, dim), torch.ones(1, 2), torch.tensor([[2, 9]]), *packed)
    # The system may also map the rest of the huge pages at both ends of the data that are read.
    used = 2 * (weight_in[0].nbytes + weight_out[0].nbytes)
    assert 0 < resident_bytes(path) <= used + 8 * (2 << 20)


def resident_bytes(path: Path) -> int:
    """Return how many bytes of a file are in memory, if this process has mapped the file."""
    pattern = rf"{re.escape(str(path))}\n(?:\w+:.*\n)*?Rss: +(\d+) kB"
    return sum(
        int(kilobytes) * 1024
        for kilobytes in re.findall(pattern, Path("/proc/self/smaps").read_text())
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3)}, "`x` must have the shape"),
        ({"weight_out": PackedExperts.pack(torch.ones(2, 3, 4))}, "`weight_out` must have the"),
    ],
)
def test_mismatched_arguments_are_named(change, message):
    x, gates, expert_ids, weight_in, weight_out = draw(2, 2)
    arguments = {
        "x": x,
        "gates": gates,
        "expert_ids": expert_ids,
        "weight_in": PackedExperts.pack(weight_in.mT),
        "weight_out": PackedExperts.pack(weight_out.mT),
    }
    with pytest.raises(ValueError, match=message):
        packed_mixture_ffn(**arguments | change)
