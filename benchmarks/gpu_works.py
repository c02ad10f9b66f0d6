"""The kernels to time, each with the bytes that it moves and the operations that it performs."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.moe_gating import eager_gating
from nmt_moe import kernels
from nmt_moe.kernels import _products

Work = Callable[[], object]


def kernel_works(device: str, tiny: bool) -> Iterator[tuple[str, Work, int, int, str]]:
    """Yield each kernel's name, a function that calls it, its traffic, operations and dtype."""
    yield from _gate_works(device, tiny)
    yield from _gating_works(device, tiny)
    yield from _row_works(device, tiny)
    experts = 2 if tiny else 64
    shape = (experts, 16, 24) if tiny else (experts, 512, 1024)
    for dtype in (torch.float32, torch.bfloat16):
        weight, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        means = torch.rand(shape[:2], device=device), torch.rand(shape[0], shape[2], device=device)
        name = str(dtype).removeprefix("torch.")

        def update(weight=weight, grad=grad, means=means) -> None:  # noqa: ANN001
            kernels.factored_adam(weight, grad, *means, step=9, lr=1e-4, beta2=0.99, eps=1e-8)

        # The gradient is read twice; the weights are read and written.
        yield f"factored Adam {name}, E={experts}", update, 4 * weight.nbytes, 0, name


def _gate_works(device: str, tiny: bool) -> Iterator[tuple[str, Work, int, int, str]]:
    """Yield a gate's products in TF32x3, and torch's in float32, forward and backward."""
    tokens, dim = (16, 16) if tiny else (65536, 512)
    for experts in (8,) if tiny else (256, 1024, 4096):
        rows, weight, noise_weight = (
            torch.randn(shape, device=device).requires_grad_()
            for shape in ((tokens, dim), (dim, experts), (dim, experts))
        )
        leaves, grad = (rows, weight, noise_weight), torch.randn(tokens, experts, device=device)

        def ours(leaves=leaves, grad=grad) -> None:  # noqa: ANN001
            torch.autograd.grad(kernels.gate_logits(*leaves), leaves, (grad, grad))

        def theirs(leaves=leaves, grad=grad) -> None:  # noqa: ANN001
            logits = leaves[0] @ leaves[1], leaves[0] @ leaves[2]
            torch.autograd.grad(logits, leaves, (grad, grad))

        flops = 3 * 2 * 2 * tokens * dim * experts  # three products for each of two matrices
        for name, work in (("gate logits", ours), ("torch's products of gates", theirs)):
            yield (
                f"{name}, forward and backward, N={tokens} E={experts}",
                work,
                2 * rows.nbytes + 4 * grad.nbytes,
                flops,
                "float32",
            )


def _gating_works(device: str, tiny: bool) -> Iterator[tuple[str, Work, int, int, str]]:
    rows = 16 if tiny else 65536
    launchers = importlib.import_module("nmt_moe.kernels._triton.gating")
    for experts in (8,) if tiny else (256, 1024, 4096):
        clean, raw_scale = (torch.randn(rows, experts, device=device) for _ in range(2))
        offsets = torch.tensor([0, rows], device=device)
        seed = torch.tensor([2**62], device=device)
        inputs = clean, raw_scale, None, seed, None, offsets

        def forward(inputs=inputs) -> object:  # noqa: ANN001
            return launchers.gating_forward(*inputs, 4, 1e-2)

        choice = forward()
        grads = (torch.ones_like(choice.gates), *choice[3:5])

        inputs = clean, raw_scale, None, offsets

        def backward(inputs=inputs, choice=choice, grads=grads) -> object:  # noqa: ANN001
            return launchers.gating_backward(*inputs, list(choice[:3]), grads, 1e-2)

        name = f"N={rows} E={experts}"
        yield f"gating forward {name}", forward, 2 * clean.nbytes, 0, ""
        yield f"gating backward {name}", backward, 4 * clean.nbytes, 0, ""

        def eager(clean=clean, raw_scale=raw_scale) -> None:  # noqa: ANN001
            leaves = [x.detach().requires_grad_() for x in (clean, raw_scale)]
            gates, importance, load = eager_gating(*leaves, 4)
            torch.autograd.grad(gates.square().sum() + importance.sum() + load.sum(), leaves)

        yield f"eager torch, forward and backward, {name}", eager, 6 * clean.nbytes, 0, ""


def _row_works(device: str, tiny: bool) -> Iterator[tuple[str, Work, int, int, str]]:
    launchers = [
        importlib.import_module(f"nmt_moe.kernels._triton.{name}")
        for name in ("gather_rows", "combine_rows", "grouped_gemm")
    ]
    gather, combine, gemm = launchers
    dim, hidden = (16, 24) if tiny else (512, 1024)
    for experts, mean in ((4, 4),) if tiny else ((32, 2048), (512, 16), (4096, 16)):
        for dtype in (torch.bfloat16,) if experts > 512 else (torch.bfloat16, torch.float32):
            plan = make_plan(experts, mean, device)
            num_rows = len(plan.row_token)
            x = torch.randn(len(plan.token_rows), dim, device=device).to(dtype)
            rows = torch.randn(num_rows, dim, device=device).to(dtype)
            wide = torch.randn(num_rows, hidden, device=device).to(dtype)
            weight = torch.randn(experts, dim, hidden, device=device).to(dtype)
            gates = torch.rand(plan.token_rows.shape, device=device)
            block = gemm.choose_block_rows(num_rows, experts, dtype)
            tiles = gemm.list_tiles(plan.offsets, num_rows, block)
            kind = str(dtype).removeprefix("torch.")
            name = f"{kind} E={experts} rows={mean}"
            flops = 2 * num_rows * dim * hidden
            traffic = rows.nbytes + wide.nbytes + weight.nbytes
            works: list[tuple[str, Callable[..., object], tuple, int, int]] = [
                ("gather", gather.gather_rows, (x, plan.row_token), 2 * rows.nbytes, 0),
                (
                    "combine",
                    gather.sum_rows,
                    (rows, plan.token_rows, gates),
                    rows.nbytes + x.nbytes,
                    0,
                ),
                (
                    "combine backward",
                    combine.combine_rows_backward,
                    (x, rows, gates, plan.token_rows),
                    3 * rows.nbytes,
                    0,
                ),
                (
                    "product, ReLU",
                    gemm.multiply_rows,
                    (rows, weight, plan.offsets, tiles, True),
                    traffic,
                    flops,
                ),
                (
                    "backward product, masked",
                    gemm.multiply_rows,
                    (wide, weight.mT, plan.offsets, tiles, False, rows),
                    traffic + rows.nbytes,
                    flops,
                ),
                (
                    "weight gradient",
                    gemm.weight_gradient,
                    (rows, wide, plan.offsets, block),
                    traffic,
                    flops,
                ),
            ]
            if _products.suits_grouped_mm(rows, weight):
                products = _products.TorchProducts(plan.offsets)
                back = partial(products.multiply_back, wide, weight)
                works += [
                    ("torch's product", products.multiply, (rows, weight), traffic, flops),
                    (
                        "torch's product, ReLU",
                        products.multiply,
                        (rows, weight, True),
                        traffic,
                        flops,
                    ),
                    ("torch's backward product", back, (), traffic, flops),
                    ("torch's backward product, masked", back, (rows,), traffic, flops),
                ]
            for label, call, arguments, num_bytes, operations in works:
                yield (
                    f"{label} {name}",
                    lambda call=call, arguments=arguments: call(*arguments),
                    num_bytes,
                    operations,
                    kind,
                )


def make_plan(experts: int, mean: int, device: str, top_k: int = 4) -> kernels.RowPlan:
    """Return a row plan with random experts, which get unequal numbers of rows, as in training."""
    tokens = experts * mean // top_k
    ids = torch.randint(experts, (tokens, top_k), device=device)
    return kernels.plan_rows(ids, experts, tokens * top_k)
