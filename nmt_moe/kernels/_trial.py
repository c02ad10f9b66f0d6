"""Compare each Triton kernel with its definition, once on each device, before it is used.

A training run must not fail because a compiler or a driver rejects a kernel, or because the kernel
computes a wrong result. If `is_sound` returns False, the caller runs torch's own operations
instead. A kernel that writes outside its tensors can still end the process, because a
program cannot recover from this error on a GPU.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from nmt_moe.kernels import reference
from nmt_moe.kernels.row_plan import RowPlan, plan_rows

# Each case is (tokens, experts, top_k, rows in each group). There are few rows, because the
# interpreter needs seconds even for these. In the first case, a row fits into a block; in the
# second case, it is read in chunks.
GATINGS = [(40, 6, 2, [25, 0, 15]), (5, 1100, 4, [5])]

_answers: dict[tuple[str, torch.device, torch.dtype], bool] = {}
_lock = threading.Lock()  # a backward pass may call `is_sound` from another thread


def is_sound(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel agrees with its definition on a device. The first call runs a trial.

    A trial waits for the device, so it must not happen during the capture of a CUDA graph: run the
    code once before capturing it, as PyTorch requires anyway. A failed trial causes one warning.

    Args:
        kernel: Name of the kernel, a key of `TRIALS`.
        device: Device on which the kernel would run.
        dtype: Data type of the kernel's main operand.
    """
    key = kernel, device, dtype
    if key not in _answers:
        with _lock:
            if key not in _answers:
                _answers[key] = _try(*key)
    return _answers[key]


def failed() -> list[str]:
    """Return the names of the kernels that failed a trial in this process, in order of trial."""
    return list(
        dict.fromkeys(kernel for (kernel, *_), is_sound in _answers.items() if not is_sound)
    )


def _try(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    # Run in a new thread, because the caller may have set autocast, a dispatch mode or a default
    # device in this one.
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(TRIALS[kernel], device, dtype).exception()
    if error is None:
        return True
    if not isinstance(error, Exception):  # such as KeyboardInterrupt
        raise error
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    triton = getattr(sys.modules.get("triton"), "__version__", "(not importable)")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(
        f"The Triton kernel `{kernel}` failed its trial on {device}{name} in {dtype}, with torch "
        f"{torch.__version__} and Triton {triton}: {reason}. torch's own, slower operations run "
        "instead. Set NMT_MOE_KERNELS=triton to run Triton kernels without trials, or "
        "NMT_MOE_KERNELS=torch to run none of them.",
        RuntimeWarning,
        stacklevel=4,
    )
    return False


def _try_gather_rows(device: torch.device, dtype: torch.dtype) -> None:
    from nmt_moe.kernels._triton import gather_rows as kernels

    for plan, x, rows, gates in _row_cases():
        on_device = _mover(device, dtype)
        copied = kernels.gather_rows(on_device(x), plan.row_token.to(device))
        _compare("gathered rows", copied, reference.gather_rows(x, plan))
        for name, weights in (("sum", None), ("weighted sum", gates)):
            moved = None if weights is None else weights.to(device, torch.float32)
            total = kernels.sum_rows(on_device(rows), plan.token_rows.to(device), moved)
            _compare(name, total, reference.combine_rows(rows, weights, plan))


def _try_combine_rows(device: torch.device, dtype: torch.dtype) -> None:
    from nmt_moe.kernels._triton.combine_rows import combine_rows_backward

    for plan, grad_y, rows, gates in _row_cases():
        on_device = _mover(device, dtype)
        tensors = on_device(grad_y), on_device(rows), gates.to(device, torch.float32)
        found = combine_rows_backward(*tensors, plan.token_rows.to(device))
        leaves = rows.requires_grad_(), gates.requires_grad_()
        expected = torch.autograd.grad(reference.combine_rows(*leaves, plan), leaves, grad_y)
        for name, one, other in zip(("rows", "gates"), found, expected, strict=True):
            _compare(f"gradient of {name}", one, other)


def _row_cases() -> Iterator[tuple[RowPlan, Tensor, Tensor, Tensor]]:
    """Yield plans with vectors of tokens, rows and gates.

    Gates are multiples of 1/8 and all other numbers are whole, so that sums are exact.
    """
    for tokens, dim in ((9, 48), (3, 1100)):  # one vector fits into a block; the other does not
        draw = _Draw()
        ids = draw.uniform(tokens, 5).argsort(1)[:, :2]
        ids[::3, 1] = 5  # an empty slot
        plan = plan_rows(ids, 5, int((ids < 5).sum()))
        rows = draw.whole(len(plan.row_token), dim)
        gates = draw.whole(tokens, 2) / 8 * (ids < 5)
        yield plan, draw.whole(tokens, dim), rows, gates


def _try_grouped_gemm(device: torch.device, dtype: torch.dtype) -> None:
    """Try the smallest and largest blocks on numbers with exact products in every dtype."""
    from nmt_moe.kernels._triton import grouped_gemm as kernels

    draw, counts = _Draw(), [3, 0, 20, 37]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    num_rows, num_experts = sum(counts), len(counts)
    rows, grad = draw.sign(num_rows, 64), draw.sign(num_rows, 80)
    weight, mask = draw.sign(num_experts, 64, 80), draw.sign(num_rows, 64)
    forward = reference.grouped_gemm(rows, weight, offsets).relu()
    back = reference.grouped_gemm(grad, weight.mT, offsets) * (mask > 0)
    parts = zip(rows.split(counts), grad.split(counts), strict=True)
    by_weight = torch.stack([own_rows.t() @ own_grad for own_rows, own_grad in parts])
    on_device = _mover(device, dtype)
    moved = [on_device(tensor) for tensor in (rows, grad, weight, mask)]
    at = offsets.to(device)
    for mean in (1, 1000):
        block = kernels.choose_block_rows(mean * num_experts, num_experts, dtype)
        tiles = kernels.list_tiles(at, num_rows, block)
        found = kernels.multiply_rows(moved[0], moved[2], at, tiles, relu=True)
        _compare("product", found, forward)
        found = kernels.multiply_rows(moved[1], moved[2].mT, at, tiles, mask=moved[3])
        _compare("gradient of rows", found, back)
        found = kernels.weight_gradient(moved[0], moved[1], at, block)
        _compare("gradient of weights", found, by_weight)
    found = torch.full_like(found, 3.0)
    kernels.zero_idle_experts(found, at)
    idle = torch.tensor(counts)[:, None, None] == 0
    _compare("zeros", found, torch.full_like(by_weight, 3.0).masked_fill(idle, 0.0))


def _try_gate_logits(device: torch.device, dtype: torch.dtype) -> None:
    """Try products in TF32x3. Plain TF32 would fail, because it loses half of the digits."""
    from nmt_moe.kernels._products import TritonProducts

    num_rows, dim, width = 300, 48, 40
    for bounds in ([0, num_rows], [0, 5, 5, num_rows]):
        draw, offsets = _Draw(), torch.tensor(bounds)
        rows, grad = draw.normal(num_rows, dim), draw.normal(num_rows, width)
        weight, start = draw.normal(len(bounds) - 1, dim, width), draw.normal(num_rows, dim)
        sizes = offsets.diff().tolist()
        parts = zip(rows.split(sizes), grad.split(sizes), strict=True)
        by_weight = torch.stack([own_rows.t() @ own_grad for own_rows, own_grad in parts])
        on_device = _mover(device, dtype)
        products = TritonProducts(offsets.to(device), num_rows, dtype, "tf32x3")
        found = products.multiply(on_device(rows), on_device(weight))
        _compare("product", found, reference.grouped_gemm(rows, weight, offsets), 1e-4)
        # Copy even if device and dtype do not change, because the kernel adds to the tensor.
        total = start.to(device, dtype, copy=True)
        products.multiply_back(on_device(grad), on_device(weight), add_to=total)
        expected = start + reference.grouped_gemm(grad, weight.mT, offsets)
        _compare("gradient of rows", total, expected, 1e-4)
        found = products.weight_gradient(on_device(rows), on_device(grad))
        _compare("gradient of weights", found, by_weight, 1e-4)


def _try_factored_adam(device: torch.device, dtype: torch.dtype) -> None:
    from nmt_moe.kernels._triton.factored_adam import factored_adam

    draw, lr, beta2, eps, weight_decay = _Draw(), 0.1, 0.9, 1e-3, 0.1
    weight, grad = (draw.whole(2, 40, 70) + 0.5 for _ in range(2))
    means = draw.uniform(2, 40), draw.uniform(2, 70)
    expected = reference.factored_adam(
        weight, grad, *means, step=1, lr=lr, beta2=beta2, eps=eps, weight_decay=weight_decay
    )
    # Copy even if device and dtype do not change, because the kernel writes to the tensors.
    moved = [tensor.to(device, dtype, copy=True) for tensor in (weight, grad)]
    new_means = [tensor.to(device, torch.float32, copy=True) for tensor in means]
    factors = lr * sqrt(1 - beta2), beta2, eps, 1 - lr * weight_decay
    factored_adam(moved[0], moved[1], new_means[0], new_means[1], *factors)
    updated = moved[0], *new_means
    names = "weight", "row_mean", "column_mean"
    for name, one, other in zip(names, updated, expected, strict=True):
        _compare(name, one, other, 1e-5 + 2 * torch.finfo(one.dtype).eps)


def _try_gating(device: torch.device, dtype: torch.dtype) -> None:
    from nmt_moe.kernels._triton.gating import write_noise

    seed = torch.tensor([2**62 + 12345], device=device)
    for rows, experts, top_k, sizes in GATINGS:
        draw, offsets = _Draw(), torch.tensor([0, *sizes]).cumsum(0)
        clean, raw_scale = draw.normal(rows, experts), draw.normal(rows, experts)
        weight = draw.uniform(rows)
        drawn = write_noise(seed, 0, torch.empty(rows, experts, dtype=dtype, device=device))
        given = draw.normal(rows, experts)
        _compare_gating(device, (clean, None, None, None, weight, offsets), top_k, None)
        _compare_gating(device, (clean, raw_scale, given, None, weight, offsets), top_k, given)
        noise = drawn.cpu().double()
        _compare_gating(device, (clean, raw_scale, None, seed, weight, offsets), top_k, noise)


def _compare_gating(device: torch.device, inputs: tuple, top_k: int, noise: Tensor | None) -> None:
    """Compare a forward and a backward pass with the definition.

    `inputs` are the arguments of the launchers up to `row_offsets`, but on the host and in float64.
    """
    from nmt_moe.kernels._triton import gating

    kernels: Any = gating

    clean, raw_scale, _, _, weight, offsets = inputs
    leaves = [x.requires_grad_() for x in (clean, raw_scale, weight) if x is not None]
    expected = reference.noisy_top_k(clean, raw_scale, top_k, noise, offsets, weight)
    moved = _to_launchers(inputs, device)
    choice = kernels.gating_forward(*moved, top_k, reference.NOISE_FLOOR)
    smooth = raw_scale is not None
    names = ["gates", "importance", *(["load"] if smooth else [])]
    for name in names:
        _compare(name, getattr(choice, name), getattr(expected, name), 1e-4)
    _compare("expert_ids", choice.ids[:, :top_k], expected.expert_ids)
    _compare("tokens_per_expert", choice.counts, expected.tokens_per_expert)
    draw = _Draw()
    grads = [draw.normal(*getattr(expected, name).shape) for name in names]
    outputs = [getattr(expected, name) for name in names]
    wanted = torch.autograd.grad(outputs, leaves, grads)
    given = _to_launchers([*grads, None, None][:3], device)
    parts = [choice.gates, choice.top, choice.ids]
    moved = moved[:2] + moved[4:]
    found = kernels.gating_backward(*moved, parts, given, reference.NOISE_FLOOR)
    for one, other in zip((x for x in found if x is not None), wanted, strict=True):
        _compare("gradient", one, other, 1e-4)


def _to_launchers(values: Sequence[Tensor | None], device: torch.device) -> Any:
    """Move tensors to the device, floating-point ones as float32; leave other values unchanged."""
    return tuple(
        value.detach().to(device, torch.float32 if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for value in values
    )


# Trials by the name that `uses_triton` is called with. Each one tries all kernels of an operation.
TRIALS: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "combine_rows": _try_combine_rows,
    "factored_adam": _try_factored_adam,
    "gate_logits": _try_gate_logits,
    "gather_rows": _try_gather_rows,
    "gating": _try_gating,
    "grouped_gemm": _try_grouped_gemm,
}


class _Draw:
    """A source of float64 numbers that does not change the state of the caller's generator."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(1)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def whole(self, *shape: int) -> Tensor:
        """Draw whole numbers from -3 to 3."""
        return (self.uniform(*shape) * 7).floor() - 3

    def sign(self, *shape: int) -> Tensor:
        """Draw -1, 0 and 1."""
        return (self.uniform(*shape) * 3).floor() - 1


def _mover(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.detach().to(device, dtype)


def _compare(name: str, found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    """Reject NaN, and differences above `tolerance`, which is both absolute and relative.

    Raises:
        ArithmeticError: if the tensors differ. The message gives the name and the largest
            difference.
    """
    found, expected = found.detach().cpu().double(), expected.detach().double()
    difference = (found - expected).abs()
    if not (difference <= tolerance * (1 + expected.abs())).all():
        raise ArithmeticError(
            f"its result `{name}` differs from the definition by up to "
            f"{difference.max().item():.2g}"
        )
