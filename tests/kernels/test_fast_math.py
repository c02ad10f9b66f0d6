"""The approximations in the Triton kernels of gating, compared with float64.

The errors of CUDA's functions are those of the CUDA C++ Programming Guide (Mathematical Functions).
Because Triton's interpreter lacks these functions, the second half of this file computes gating in
torch, with an error of the largest size in the result of each of them.
"""

import importlib
import math

import pytest
import torch

from nmt_moe.kernels import reference
from nmt_moe.kernels.reference import NOISE_FLOOR
from tests.support.gating import make_inputs

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")
parts = importlib.import_module("nmt_moe.kernels._triton.gating_parts")
noise_scale, normal_cdf, to_normal = parts.noise_scale, parts.normal_cdf, parts.to_normal

# The relative error of 2 units in the last place, and the absolute error of log2 from 0.5 to 2.
TWO_ULP, LOG2_ERROR = 2.0**-22, 2.0**-22


@triton.jit
def scale_kernel(raw, scale, slope, size: tl.constexpr):
    index = tl.arange(0, size)
    value, derivative = noise_scale(tl.load(raw + index), 1e-2)
    tl.store(scale + index, value)
    tl.store(slope + index, derivative)


@triton.jit
def cdf_kernel(z, result, size: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(result + index, normal_cdf(tl.load(z + index)))


@triton.jit
def normal_kernel(bits, more_bits, one, other, size: tl.constexpr):
    index = tl.arange(0, size)
    first, second = to_normal(
        tl.load(bits + index).to(tl.uint32, bitcast=True),
        tl.load(more_bits + index).to(tl.uint32, bitcast=True),
    )
    tl.store(one + index, first)
    tl.store(other + index, second)


def largest_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.double() - other).abs().max().item()


def test_the_noise_scale_and_its_derivative(device):
    raw = torch.linspace(-30, 30, 2**14)
    raw[:4] = torch.tensor([-1e30, -200.0, 0.0, 200.0])
    scale, slope = torch.empty_like(raw), torch.empty_like(raw)
    scale_kernel[(1,)](raw, scale, slope, len(raw))
    exact = torch.nn.functional.softplus(raw.double(), threshold=100) + NOISE_FLOOR
    error = (scale.double() - exact).abs() / exact.clamp_min(1)
    assert error.max() < 5e-7
    assert largest_error(slope, raw.double().sigmoid()) < 5e-7


def test_the_normal_distribution(device):
    z = torch.linspace(-14, 14, 2**15)
    z[:4] = torch.tensor([-torch.inf, torch.inf, 1e30, -1e30])
    result = torch.empty_like(z)
    cdf_kernel[(1,)](z, result, len(z))
    assert largest_error(result, torch.special.ndtr(z.double())) < 7.5e-8 + 2e-7
    assert result[:4].tolist() == [0, 1, 1, 0]


def test_noise_follows_from_bits(device):
    torch.manual_seed(1)
    bits, more_bits = torch.randint(-(2**31), 2**31, (2, 2**14)).to(torch.int32)
    # The extremes: the smallest and the largest uniform number, and angles of 0, pi/2 and -pi.
    bits[:6] = torch.tensor([0, 0, 0, -1, -1, -128])
    more_bits[:6] = torch.tensor([0, 2**30, -(2**31), 0, 1, 2])
    one, other = torch.empty(2, len(bits))
    normal_kernel[(1,)](bits, more_bits, one, other, len(bits))
    uniform = ((bits.long() % 2**32).double() + 0.5) * 2.0**-32
    radius, angle = (-2 * uniform.log()).sqrt(), more_bits.double() * math.pi * 2.0**-31
    # An error of log2 near 1 moves a radius near 0 by up to sqrt(2 ln(2) 2^-22), and rounding the
    # uniform number to float32 moves it by less.
    assert largest_error(one, radius * angle.cos()) < 7e-4
    assert largest_error(other, radius * angle.sin()) < 7e-4
    far = radius > 0.1  # 99.5 % of all numbers
    assert largest_error(one[far], (radius * angle.cos())[far]) < 1e-5
    assert one[0] == pytest.approx(6.76, abs=0.01)  # the largest noise
    assert one.isfinite().all()


class Approximate:
    """CUDA's approximations in float64, with errors of the largest size and random signs."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def sign(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 2, x.shape, generator=self.generator) * 2.0 - 1

    def log2(self, x: torch.Tensor) -> torch.Tensor:
        return x.log2() + LOG2_ERROR * self.sign(x)

    def exp2(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp2() * (1 + TWO_ULP * self.sign(x))

    def divide(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        quotient = x / y
        return quotient * (1 + TWO_ULP * self.sign(quotient))

    def noise_scale(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        power = self.exp2(-raw.abs() / math.log(2))
        scale = math.log(2) * self.log2(1 + power) + raw.clamp_min(0) + NOISE_FLOOR
        return scale, self.divide(torch.where(raw >= 0, 1.0, power), 1 + power)

    def density(self, z: torch.Tensor) -> torch.Tensor:
        return parts.INV_SQRT_2PI.value * self.exp2(-0.5 / math.log(2) * z * z)

    def cdf(self, z: torch.Tensor) -> torch.Tensor:
        t = self.divide(torch.ones_like(z), 1 + 0.2316419 * z.abs())
        factors = (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530)
        series = torch.zeros_like(z)
        for factor in factors:
            series = factor + t * series
        tail = self.density(z) * t * series
        return torch.where(z >= 0, 1 - tail, tail)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_errors_of_the_approximations_stay_small_in_gates_loads_and_gradients(seed):
    """Compute what the kernels compute, with approximations, and compare with float64."""
    top_k, rows, experts = 4, 50, 60
    inputs = make_inputs(rows, experts, torch.float64)
    clean, raw, noise = (inputs[name].detach() for name in ("clean", "raw_scale", "noise"))
    leaves = clean.clone().requires_grad_(), raw.clone().requires_grad_()
    exact = reference.noisy_top_k(*leaves, top_k, noise)
    grad_load, grad_gates = torch.randn(experts).double(), torch.randn(rows, top_k).double()
    by_load = torch.autograd.grad((exact.load * grad_load).sum(), leaves, retain_graph=True)
    by_gates = torch.autograd.grad((exact.gates * grad_gates).sum(), leaves)

    cuda = Approximate(seed)
    scale, by_raw = cuda.noise_scale(raw)
    noisy = clean + noise * scale
    top, ids = noisy.sort(dim=1, descending=True, stable=True)
    powers = cuda.exp2((top[:, :top_k] - top[:, :1]) / math.log(2))
    gates = cuda.divide(powers, powers.sum(1, keepdim=True))
    assert torch.equal(ids[2:, :top_k], exact.expert_ids[2:])  # the first two rows have ties
    assert largest_error(gates, exact.gates) < 5e-6

    kth, next_one = top[:, top_k - 1, None], top[:, top_k, None]
    inside = noisy > next_one
    z = cuda.divide(clean - torch.where(inside, next_one, kth), scale)
    assert largest_error(cuda.cdf(z).sum(0), exact.load) < rows * 1e-6

    slope = cuda.divide(grad_load * cuda.density(z), scale)
    by_top = torch.zeros_like(clean)
    by_top.scatter_(1, ids[:, top_k - 1, None], -torch.where(inside, 0, slope).sum(1, True))
    by_top.scatter_add_(1, ids[:, top_k, None], -torch.where(inside, slope, 0).sum(1, True))
    recovered = cuda.divide(noisy - clean, scale)
    rough = slope + by_top, (by_top * recovered - slope * z) * by_raw
    for one, other in zip(rough, by_load, strict=True):
        assert largest_error(one[2:], other[2:]) < 2e-5 * other.abs().max()

    by_top = gates * (grad_gates - (gates * grad_gates).sum(1, True))
    dense = torch.zeros_like(clean).scatter(1, ids[:, :top_k], by_top)
    for one, other in zip((dense, dense * recovered * by_raw), by_gates, strict=True):
        assert largest_error(one[2:], other[2:]) < 2e-5 * other.abs().max()
