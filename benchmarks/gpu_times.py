"""Measure how long kernels take on this device, relative to the shortest possible time."""

import importlib
import itertools
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu_works import Work, kernel_works, make_plan
from nmt_moe import kernels
from nmt_moe.kernels import _products
from nmt_moe.moe import MoEConfig, MoELayer

CEILINGS = "ceilings.json"


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
    for name, work, num_bytes, flops, dtype in kernel_works(device, tiny):
        least = num_bytes / ceilings["copy bytes/s"]
        if flops:
            least = max(least, flops / ceilings[f"{dtype} FLOP/s"])
        taken = seconds(work, device, tiny)
        rows.append([name, f"{taken * 1e3:.3f}", f"{least * 1e3:.3f}", f"{least / taken:.0%}"])
    return timing.markdown_table(["kernel", "ms", "least ms", "least / measured"], rows)


def sweep_products(device: str, tiny: bool, out: Path) -> str:
    """Time products with different numbers of rows per expert, block sizes, warps and stages."""
    gemm = importlib.import_module("nmt_moe.kernels._triton.grouped_gemm")
    experts, dim, hidden = (4, 16, 24) if tiny else (256, 512, 1024)
    blocks = (16, 32) if tiny else (16, 32, 64, 128)
    shapes = [None] if tiny else [None, *itertools.product((4, 8), (2, 3, 4))]
    lines = []
    for mean in (4,) if tiny else (4, 8, 12, 16, 24, 32, 64, 128, 256, 512):
        plan = make_plan(experts, mean, device)
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
