"""Noisy top-k gating by Triton kernels, compared with its definition, and its noise."""

import importlib

import pytest
import torch

from nmt_moe.kernels import noisy_top_k
from tests.support.gating import (
    SHAPES,
    assert_infinite_logits_are_right,
    assert_is_the_definition,
    make_inputs,
    offsets_of,
)

pytest.importorskip("triton")

# Use import_module, because the package's attribute of that name is the function.
operation = importlib.import_module("nmt_moe.kernels.gating")
launchers = importlib.import_module("nmt_moe.kernels._triton.gating")


def make_seed(number: int = 2**62 + 12345) -> torch.Tensor:
    return torch.tensor([number])


def assert_is_right(inputs, top_k, sizes, training=True, one_by_one=False):
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    assert_is_the_definition(inputs, top_k, sizes, training, one_by_one, **tolerance)


@pytest.fixture(autouse=True)
def _poisoned_memory(device, monkeypatch):
    """Fill fresh memory with NaN, so that elements that are never written are noticed."""
    use_blocks(monkeypatch, columns=1024, numbers=2**13, tile=(64, 128))  # each program is slow
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def use_blocks(monkeypatch, columns: int, numbers: int, tile: tuple[int, int] | None = None):
    """Set the maximum number of columns and the number of elements per block, and the tiles."""
    monkeypatch.setattr(launchers, "MAX_BLOCK_COLUMNS", columns)
    monkeypatch.setattr(launchers, "WARP_NUMBERS", numbers)
    for name in ("SUM_TILE", "BACKWARD_TILE"):
        monkeypatch.setattr(launchers, name, tile or (max(numbers // columns, 1), columns))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("rows", "experts", "top_k", "sizes"), SHAPES)
def test_kernels_compute_the_definition(rows, experts, top_k, sizes, training):
    assert_is_right(make_inputs(rows, experts, torch.float32), top_k, sizes, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "sizes"),
    [
        pytest.param(20, 39, 4, None, id="chunks"),
        pytest.param(12, 32, 7, [5, 0, 7], id="groups"),
        pytest.param(4, 18, 15, None, id="more-than-a-chunk-holds"),
    ],
)
def test_wide_rows_are_read_in_chunks(rows, experts, top_k, sizes, training, monkeypatch):
    use_blocks(monkeypatch, columns=16, numbers=512)
    assert_is_right(make_inputs(rows, experts, torch.float32), top_k, sizes, training)


@pytest.mark.parametrize("columns", [16, 1024])
@pytest.mark.parametrize("training", [True, False])
def test_a_nan_logit_makes_its_row_nan_whichever_logits_are_found_largest(
    columns, training, monkeypatch
):
    use_blocks(monkeypatch, columns, numbers=512)
    inputs = make_inputs(9, 20, torch.float32)
    clean = inputs["clean"].detach().clone()
    clean[3, 17] = float("nan")
    out = noisy_top_k(clean, inputs["raw_scale"] if training else None, 4)
    assert out.gates.isnan().all(1).tolist() == [row == 3 for row in range(9)]
    assert out.importance.isnan().any()


@pytest.mark.parametrize("columns", [16, 1024])
@pytest.mark.parametrize("sizes", [None, [2, 4]])
def test_logits_of_minus_infinity_are_chosen_once_each(sizes, columns, monkeypatch):
    use_blocks(monkeypatch, columns, numbers=512)
    clean = torch.full((6, 40), float("-inf"))
    clean[0, 0] = clean[1, 39] = clean[2, 17] = 0.0  # fewer than three are finite
    clean[3, 20:22] = torch.tensor([1.0, 2.0])
    clean[4, 16:32] = -1.0
    clean[5] = torch.randn(40)
    assert_is_right({"clean": clean.requires_grad_()}, 3, sizes, training=False)
    out = noisy_top_k(clean, None, 3, row_offsets=offsets_of(sizes))
    expected = [[0, 1, 2], [39, 0, 1], [17, 0, 1], [21, 20, 0], [16, 17, 18]]
    assert out.expert_ids[:5].tolist() == expected
    assert out.tokens_per_expert.sum() == 18


@pytest.mark.parametrize("columns", [16, 1024])
def test_noise_and_logits_of_minus_infinity(columns, monkeypatch):
    use_blocks(monkeypatch, columns, numbers=512)
    assert_infinite_logits_are_right()


def test_a_program_takes_several_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(launchers, "MAX_WARPS", 2)
    use_blocks(monkeypatch, columns=1024, numbers=128)
    assert_is_right(make_inputs(50, 16, torch.float32), 3, [30, 20])


@pytest.mark.parametrize("training", [True, False])
def test_results_of_which_only_one_has_a_gradient(training):
    assert_is_right(make_inputs(9, 6, torch.float32), 2, None, training, one_by_one=True)


def run(inputs, noise=None):
    """Return the results of a pass and the gradients of a loss that depends on all of them."""
    leaves = [inputs["clean"], inputs["raw_scale"]]
    out = noisy_top_k(*leaves, 4, noise)
    loss = (out.gates * torch.arange(4)).sum() + out.importance.square().sum()
    return [*out[:5], *torch.autograd.grad(loss + out.load.square().sum(), leaves)]


def test_forward_and_backward_draw_the_same_noise(monkeypatch):
    monkeypatch.setattr(operation, "draw_seed", lambda device: make_seed())
    inputs = make_inputs(40, 22, torch.float32)
    noise = launchers.write_noise(make_seed(), 0, torch.empty(40, 22))
    for one, other in zip(run(inputs), run(inputs, noise), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_choice_does_not_depend_on_the_blocks(monkeypatch):
    monkeypatch.setattr(operation, "draw_seed", lambda device: make_seed())
    inputs = make_inputs(40, 70, torch.float32)
    whole = run(inputs)
    for columns, numbers in ((128, 2**11), (32, 2**10), (64, 2**10)):
        use_blocks(monkeypatch, columns, numbers)
        others = run(inputs)
        assert torch.equal(whole[0], others[0])  # gates
        assert torch.equal(whole[1], others[1])  # ids
        for one, other in zip(whole, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_bits():
    inputs = make_inputs(40, 22, torch.float32)

    def seeded(seed):
        torch.manual_seed(seed)
        return run(inputs)

    first = seeded(5)
    assert all(torch.equal(a, b) for a, b in zip(first, seeded(5), strict=True))
    assert not torch.equal(first[1], seeded(6)[1])


def test_the_seed_comes_from_the_generator_of_the_device(device):
    """The host does not know the seed, so a replay of a CUDA graph draws another one."""
    seed = operation.draw_seed(torch.device(device))
    assert (seed.device.type, seed.shape, seed.dtype) == (device, (1,), torch.int64)
    torch.manual_seed(1)
    seeds = torch.cat([operation.draw_seed(seed.device) for _ in range(100)])
    assert len(seeds.unique()) == 100
    assert seeds.max() > 2**62 > seeds.min() > 0  # all 63 bits are used


def test_noise_is_standard_normal(monkeypatch):
    use_blocks(monkeypatch, columns=256, numbers=2**15)
    noise = launchers.write_noise(make_seed(), 0, torch.empty(400, 250)).flatten().sort().values
    ranks = torch.arange(1, len(noise) + 1) / len(noise)
    # In this Kolmogorov-Smirnov test, one seed in a thousand exceeds 1.95.
    distance = (torch.special.ndtr(noise) - ranks).abs().max()
    assert distance * len(noise) ** 0.5 < 1.95


def test_neighbours_are_independent(monkeypatch):
    use_blocks(monkeypatch, columns=256, numbers=2**15)
    noise = launchers.write_noise(make_seed(), 0, torch.empty(400, 250))
    for rows, columns in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0)):
        one, other = noise[rows:, columns:], noise[: 400 - rows, : 250 - columns]
        # The limit is five standard deviations of the correlation between 10^5 pairs.
        assert (one * other).mean().abs() < 5 * 1e5**-0.5


def test_noise_belongs_to_seed_row_and_column():
    noise = launchers.write_noise(make_seed(), 0, torch.empty(8, 20))
    assert torch.equal(launchers.write_noise(make_seed(), 3, torch.empty(5, 9)), noise[3:, :9])
    for more, row in ((1, 0), (2**32, 0), (0, 2**31), (0, 2**32), (0, 2**40)):
        other = launchers.write_noise(make_seed() + more, row, torch.empty(8, 20))
        assert not (other == noise).any()


def test_a_group_of_rows_has_its_own_sums():
    inputs = make_inputs(30, 6, torch.float32)
    inputs.pop("noise")
    out = noisy_top_k(**inputs, top_k=2, row_offsets=offsets_of([10, 0, 20]))
    assert out.tokens_per_expert.sum(1).tolist() == [20, 0, 40]
    assert not out.load[1].any()


def test_unsupported_sizes_take_another_path(monkeypatch):
    monkeypatch.setattr(launchers, "gating_forward", None)  # a call would fail
    clean = torch.randn(3, 20)
    assert noisy_top_k(clean, clean, 16).gates.shape == (3, 16)  # K is too large
    assert noisy_top_k(clean.double(), clean.double(), 2).gates.dtype == torch.float64
    monkeypatch.setattr(operation, "MAX_TRITON_EXPERTS", 16)
    assert noisy_top_k(clean, clean, 2).tokens_per_expert.sum() == 6
