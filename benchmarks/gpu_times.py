"""Measure how long kernels take on this device, relative to the shortest possible time."""

import importlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.moe_gating import eager_gating
from nmt_moe import kernels
from nmt_moe.kernels import _products
from nmt_moe.moe import MoEConfig, MoELayer

CEILINGS = "ceilings.json"
Work = Callable[[], object]


def seconds(work: Work, device: str, tiny: bool) -> float:
    """Return the median time of `work`, replayed from a CUDA graph to exclude the host's time.

    On the CPU, where the program is only tried out, a single call of `work` is timed.
    """
    if device == "cpu":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    once = _time(graph.replay, 1)
    count = max(1, min(200, int(0.02 / max(once, 1e-6))))
    samples = [_time(graph.replay, count) for _ in range(3 if tiny else 7)]
    del graph
    return statistics.median(samples)


def _time(replay: Work, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def measure_ceilings(device: str, tiny: bool, out: Path) -> str:
    """Measure the speeds of copying and of large products, and save them for later parts."""
    size = 2**12 if tiny else 2**29  # float32 numbers
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source), device, tiny)
    found = {"copy bytes/s": copy}
    side = 64 if tiny else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        result = torch.empty_like(left)
        taken = seconds(
            lambda left=left, right=right, out=result: torch.mm(left, right, out=out), device, tiny
        )
        found[f"{str(dtype).removeprefix('torch.')} FLOP/s"] = 2 * side**3 / taken
    (out / CEILINGS).write_text(json.dumps(found))
    rows = [[name, f"{value / 1e12:.3f}"] for name, value in found.items()]
    return timing.markdown_table(["ceiling", "10^12"], rows)


def time_kernels(device: str, tiny: bool, out: Path) -> str:
    """Time each kernel, and compare its time with the least time for its bytes and operations."""
    ceilings = json.loads((out / CEILINGS).read_text())
    rows = []
    for name, work, num_bytes, flops, dtype in _kernel_works(device, tiny):
        least = num_bytes / ceilings["copy bytes/s"]
        if flops:
            least = max(least, flops / ceilings[f"{dtype} FLOP/s"])
        taken = seconds(work, device, tiny)
        rows.append([name, f"{taken * 1e3:.3f}", f"{least * 1e3:.3f}", f"{least / taken:.0%}"])
    return timing.markdown_table(["kernel", "ms", "least ms", "share"], rows)


def _kernel_works(device: str, tiny: bool) -> Iterator[tuple[str, Work, int, int, str]]:
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
            plan = _make_plan(experts, mean, device)
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


def _make_plan(experts: int, mean: int, device: str, top_k: int = 4) -> kernels.RowPlan:
    """Send tokens to random experts, which get unequal numbers of rows, as in training."""
    tokens = experts * mean // top_k
    ids = torch.randint(experts, (tokens, top_k), device=device)
    return kernels.plan_rows(ids, experts, tokens * top_k)


def sweep_products(device: str, tiny: bool, out: Path) -> str:
    """Time products with different numbers of rows per expert, block sizes, warps and stages."""
    gemm = importlib.import_module("nmt_moe.kernels._triton.grouped_gemm")
    experts, dim, hidden = (4, 16, 24) if tiny else (256, 512, 1024)
    blocks = (16, 32) if tiny else (16, 32, 64, 128)
    shapes = [None] if tiny else [None, *itertools.product((4, 8), (2, 3, 4))]
    lines = []
    for mean in (4,) if tiny else (4, 8, 12, 16, 24, 32, 64, 128, 256, 512):
        plan = _make_plan(experts, mean, device)
        rows = torch.randn(len(plan.row_token), dim, device=device).bfloat16()
        weight = torch.randn(experts, dim, hidden, device=device).bfloat16()
        chosen = gemm.choose_block_rows(len(rows), experts, rows.dtype)
        times = {}
        for block, shape in itertools.product(blocks, shapes):
            tiles = gemm.list_tiles(plan.offsets, len(rows), block)
            times[block, shape] = _time_shape(gemm, rows, weight, plan, tiles, shape, device, tiny)
        best = min(times, key=times.__getitem__)
        by_torch = "-"
        with mock.patch.object(_products, "MIN_MEAN_ROWS", 0):  # to find the crossover
            suits = _products.suits_grouped_mm(rows, weight)
        if suits:
            products = _products.TorchProducts(plan.offsets)
            taken = seconds(lambda p=products, r=rows, w=weight: p.multiply(r, w), device, tiny)
            by_torch = f"{taken * 1e6:.0f}"
        default = [f"{times[block, None] * 1e6:.0f}" for block in blocks]
        shape = (
            "current settings" if best[1] is None else f"{best[1][0]} warps, {best[1][1]} stages"
        )
        figure = f"{times[best] * 1e6:.0f}"
        lines.append([str(mean), *default, str(chosen), f"{best[0]}, {shape}", figure, by_torch])
    columns = ["rows per expert", *(f"µs, block {block}" for block in blocks)]
    columns += ["chosen block", "fastest", "fastest, µs", "torch's µs"]
    return timing.markdown_table(columns, lines)


def _time_shape(
    gemm,  # noqa: ANN001
    rows: Tensor,
    weight: Tensor,
    plan: kernels.RowPlan,
    tiles,  # noqa: ANN001
    shape: tuple[int, int] | None,
    device: str,
    tiny: bool,
) -> float:
    chosen = gemm.choose_shape(tiles.block_rows, *weight.shape[1:], rows.dtype)
    if shape is not None:
        chosen = chosen._replace(warps=shape[0], stages=shape[1])
    with mock.patch.object(gemm, "choose_shape", return_value=chosen):
        return seconds(
            lambda: gemm.multiply_rows(rows, weight, plan.offsets, tiles, True), device, tiny
        )


def sweep_adam(device: str, tiny: bool, out: Path) -> str:
    """Time factored Adam with tiles of different sizes."""
    adam = importlib.import_module("nmt_moe.kernels._triton.factored_adam")
    shape = (2, 16, 24) if tiny else (256, 512, 1024)
    weight, grad = (torch.randn(shape, device=device) for _ in range(2))
    means = torch.rand(shape[:2], device=device), torch.rand(shape[0], shape[2], device=device)
    tiles = [(16, 256, 8)] if tiny else itertools.product((8, 16, 32), (128, 256, 512), (4, 8))
    ceilings = json.loads((out / CEILINGS).read_text())
    least = 4 * weight.nbytes / ceilings["copy bytes/s"]
    lines = []
    for rows, columns, warps in tiles:
        names = {"TILE_ROWS": rows, "TILE_COLUMNS": columns, "WARPS": warps}
        with mock.patch.multiple(adam, **names):
            taken = seconds(
                lambda: adam.factored_adam(weight, grad, *means, 1e-5, 0.99, 1e-8, 1.0),
                device,
                tiny,
            )
        cells = str(rows), str(columns), str(warps), f"{taken * 1e3:.3f}", f"{least / taken:.0%}"
        lines.append(list(cells))
    return timing.markdown_table(["rows", "columns", "warps", "ms", "share of copy speed"], lines)


def profile_layer(device: str, tiny: bool, out: Path) -> str:
    """List the kernels that take most of a layer's time, and show how long the device is busy."""
    from torch.profiler import ProfilerActivity, profile

    tokens, config = (64, MoEConfig(16, 24, 8, 2)) if tiny else (2048, MoEConfig(512, 1024, 512, 4))
    layer = MoELayer(config).to(device)
    x = torch.randn(tokens, config.model_dim, device=device)
    is_on_gpu = device != "cpu"

    def step() -> None:
        layer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            y, stats = layer(x)
            loss = y.float().square().mean() + stats.balance_loss
        loss.backward()

    for _ in range(1 if tiny else 5):
        step()
    repeats = 1 if tiny else 10
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_on_gpu else [])]
    timing.synchronise(device)
    with profile(activities=activities) as trace:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        timing.synchronise(device)
        wall = (time.perf_counter() - begin) / repeats
    trace.export_chrome_trace(str(out / "layer-trace.json"))
    spent = "self_device_time_total" if is_on_gpu else "self_cpu_time_total"
    found = sorted(trace.key_averages(), key=lambda event: -getattr(event, spent))
    found = [event for event in found if getattr(event, spent) > 0]
    total = sum(getattr(event, spent) for event in found) / repeats / 1e6
    rows = [
        [event.key[:60], str(event.count // repeats), f"{getattr(event, spent) / repeats:.1f}"]
        for event in found[:25]
    ]
    launches = sum(e.count for e in trace.key_averages() if "LaunchKernel" in e.key) // repeats
    summary = [
        ["elapsed, ms per step (profiled)", f"{wall * 1e3:.3f}"],
        [f"{'device' if is_on_gpu else 'CPU'} busy, ms per step", f"{total * 1e3:.3f}"],
        ["share of the elapsed time", f"{total / wall:.0%}"],
        ["kernel launches per step", str(launches) if is_on_gpu else "-"],
    ]
    tables = timing.markdown_table(["a layer, forward and backward", ""], summary)
    return f"{tables}\n\n{timing.markdown_table(['kernel', 'calls', 'µs per step'], rows)}"
