"""Print the resources that each Triton kernel needs on an A100 and an H100, without a GPU.

    python -m benchmarks.gpu_budgets
    python -m benchmarks.gpu_budgets --gpu H100 --kernels gating --json budgets.json

Each kernel is compiled to machine code for the arguments that a launch would pass to it. `blocks`
is how many blocks fit on a multiprocessor at a time. `instructions` is the number of instructions
in the code; those in a loop are counted once. `per element` is the number of instructions that a
thread executes for each of its elements when there are many rows. It takes into account how often
a loop runs for gating, but not for other kernels.
"""

import argparse
import json
import os
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # Triton cannot compile while it interprets

import torch
import triton

from benchmarks import timing
from benchmarks.gpu_compile import GPUS, Launch, compile_launch
from nmt_moe.kernels._products import TritonProducts
from nmt_moe.kernels._triton import (
    combine_rows,
    factored_adam,
    gather_rows,
    gating,
    grouped_gemm,
)

COLUMNS = [
    *("gpu", "kernel", "registers", "spilled", "shared", "blocks", "tensor cores", "warnings"),
    *("instructions", "per element"),
]
DIM, HIDDEN, EXPERTS, TOKENS = 512, 1024, 4, 64
# Mean numbers of rows per expert that lead to small, medium and large blocks in bfloat16, the
# usual dtype.
MEANS = {torch.bfloat16: (16, 128, 1024), torch.float16: (1024,), torch.float32: (1024,)}
# Each case is (experts, rows per group, groups): a gate, and the gates of groups with few rows.
GATES = [(256, 65536, 1), (16, 20, 16)]
# Each case is (experts, experts per token, noise). With up to 1024 experts, a block holds whole
# rows; with more, rows are read in chunks.
GATINGS = [
    (6, 6, "drawn"),
    (256, 4, "drawn"),
    (1024, 8, "drawn"),
    (1024, 4, "given"),
    (4096, 4, "drawn"),
    (4100, 4, "none"),
]


def row_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Yield the kernels that gather and combine rows."""
    x, gates = torch.empty(10, DIM, dtype=dtype), torch.empty(10, 4, dtype=dtype)
    ids = torch.empty(10, 4, dtype=torch.int64)
    size = gather_rows.BLOCK_SIZE
    gather = partial(gather_rows.gather_rows, x, ids[0])
    backward = partial(combine_rows.combine_rows_backward, x, x, gates, ids)
    yield Launch("gather", gather_rows, "_gather_kernel", gather, size)
    add_up = partial(gather_rows.sum_rows, x, ids, gates)
    yield Launch("sum", gather_rows, "_sum_kernel", add_up, size)
    yield Launch("combine_backward", combine_rows, "_combine_backward_kernel", backward, size)


def product_launches(dtype: torch.dtype, mean: int) -> Iterator[Launch]:
    """Yield the kernels of the experts' products, with `mean` rows per expert."""
    num_rows = mean * EXPERTS
    rows = torch.empty(num_rows, DIM, dtype=dtype)
    hidden = torch.empty(num_rows, HIDDEN, dtype=dtype)
    weight_in = torch.empty(EXPERTS, DIM, HIDDEN, dtype=dtype)
    weight_out = torch.empty(EXPERTS, HIDDEN, DIM, dtype=dtype)
    offsets = torch.arange(EXPERTS + 1) * mean
    block_rows = grouped_gemm.choose_block_rows(num_rows, EXPERTS, dtype)
    tiles = grouped_gemm.list_tiles(offsets, num_rows, block_rows)
    multiply = partial(grouped_gemm.multiply_rows, expert_offsets=offsets, tiles=tiles)
    calls = [
        ("multiply", "multiply_kernel", partial(multiply, rows, weight_in, relu=True)),
        (
            "multiply_back",
            "multiply_kernel",
            partial(multiply, rows, weight_out.transpose(1, 2), mask=hidden),
        ),
        (
            "weight_gradient",
            "weight_gradient_kernel",
            partial(grouped_gemm.weight_gradient, rows, hidden, offsets, block_rows),
        ),
    ]
    for name, kernel, call in calls:
        yield Launch(f"{name} {mean}", grouped_gemm, kernel, call)


def gate_launches(experts: int, mean: int, groups: int) -> Iterator[Launch]:
    """Yield the products of a gate, or of one gate for each group of `mean` rows."""
    num_rows = groups * mean
    rows, grad = torch.empty(num_rows, DIM), torch.empty(num_rows, experts)
    weight, offsets = torch.empty(groups, DIM, experts), torch.arange(groups + 1) * mean
    products = TritonProducts(offsets, num_rows, rows.dtype, "tf32x3")
    calls = [
        ("multiply", partial(products.multiply, rows, weight)),
        ("multiply_back", partial(products.multiply_back, grad, weight, add_to=rows)),
        ("weight_gradient", partial(products.weight_gradient, rows, grad)),
    ]
    for name, call in calls:
        kernel = f"{name.removesuffix('_back')}_kernel"
        yield Launch(f"gate {experts} {name} {mean}", grouped_gemm, kernel, call)


def zero_launch(dtype: torch.dtype) -> Launch:
    """Return the kernel that sets the gradients of experts without rows to zero."""
    weight_grad = torch.empty(EXPERTS, DIM, HIDDEN, dtype=dtype)
    call = partial(grouped_gemm.zero_idle_experts, weight_grad, torch.zeros(EXPERTS + 1).long())
    return Launch("zero", grouped_gemm, "zero_kernel", call)


def gating_launches(experts: int, top_k: int, noise: str) -> Iterator[Launch]:
    """Yield the kernels of noisy top-k gating."""
    clean = torch.empty(TOKENS, experts)
    raw_scale = None if noise == "none" else clean
    seed = torch.zeros(1, dtype=torch.int64) if noise == "drawn" else None
    given = clean if noise == "given" else None
    inputs = clean, raw_scale, given, seed, torch.empty(TOKENS), torch.tensor([0, TOKENS])
    count = top_k + (raw_scale is not None and top_k < experts)
    choice = [torch.empty(TOKENS, size) for size in (top_k, count, count)]
    choice[2] = choice[2].int()
    grad = torch.empty(1, experts)
    grads = torch.empty(TOKENS, top_k), grad, grad if count > top_k else None
    forward = partial(gating.gating_forward, *inputs, top_k, 1e-2)
    backward = partial(gating.gating_backward, clean, raw_scale, *inputs[4:], choice, grads, 1e-2)
    name = f"gating {experts} {top_k} {noise}"
    rows = gating.whole_rows(TOKENS, 1, experts)
    size = prod(rows.block)
    if rows.chunks > 1:
        yield Launch(f"{name} select", gating, "select_kernel", forward, size, rows.chunks)
        yield Launch(f"{name} sum", gating, "sum_kernel", forward, prod(gating.SUM_TILE), 0)
    else:
        yield Launch(f"{name} forward", gating, "forward_kernel", forward, size, 0)
    tiles = gating.tiles(TOKENS, 1, experts, gating.BACKWARD_TILE)
    size, repeats = prod(tiles.block), tiles.chunks if tiles.chunks > 1 else 0
    yield Launch(f"{name} backward", gating, "backward_kernel", backward, size, repeats)


def adam_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Yield the kernels of factored Adam."""
    weight = torch.empty(EXPERTS, DIM, HIDDEN, dtype=dtype)
    means = torch.empty(EXPERTS, DIM), torch.empty(EXPERTS, HIDDEN)
    call = partial(factored_adam.factored_adam, weight, weight, *means, 1e-3, 0.999, 1e-8, 0.99)
    size = factored_adam.TILE_ROWS * factored_adam.TILE_COLUMNS
    for kernel, elements in (("square_sums", size), ("column_means", 0), ("update", size)):
        yield Launch(f"adam {kernel}", factored_adam, f"_{kernel}_kernel", call, elements)


def all_launches() -> Iterator[tuple[str, Launch]]:
    """Yield each launch with the name of its dtype."""
    for dtype, means in MEANS.items():
        launches = [*row_launches(dtype), zero_launch(dtype)]
        for mean in means:
            launches += product_launches(dtype, mean)
        yield from ((str(dtype).removeprefix("torch."), launch) for launch in launches)
    for gate in GATES:
        yield from (("tf32x3", launch) for launch in gate_launches(*gate))
    for case in GATINGS:
        yield from (("float32", launch) for launch in gating_launches(*case))
    for dtype in (torch.float32, torch.bfloat16):
        yield from ((str(dtype).removeprefix("torch."), launch) for launch in adam_launches(dtype))


def measure(gpus: list[str], wanted: str) -> dict[str, dict[str, Any]]:
    """Compile the kernels whose names begin with `wanted`, and return reports by GPU and name."""
    chosen = [(dtype, launch) for dtype, launch in all_launches() if launch.name.startswith(wanted)]
    if not chosen:
        raise ValueError(
            f"--kernels must be the beginning of a kernel's name, but none begins with {wanted!r}."
        )
    reports = {}
    for index, (dtype, launch) in enumerate(chosen, 1):
        timing.say(f"{index} of {len(chosen)}: {dtype} {launch.name}")
        for gpu in gpus:
            reports[f"{gpu} {dtype} {launch.name}"] = compile_launch(launch, gpu)
    return reports


def to_rows(reports: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return a row of the table for each report."""
    rows = []
    for name, report in reports.items():
        gpu, kernel = name.split(" ", 1)
        cores = "wgmma" if report["wgmma"] else "mma" if report["mma"] else "-"
        numbers = [str(report[key]) for key in ("registers", "spilled", "shared", "blocks")]
        last = [str(report["instructions"]), str(report["per_element"] or "-")]
        rows.append([gpu, kernel, *numbers, cores, " ".join(report["warnings"]) or "-", *last])
    return rows


def main() -> None:
    """Compile the kernels, print a table, and write JSON if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu", nargs="+", choices=GPUS, default=list(GPUS), help="GPUs to compile for (all)"
    )
    parser.add_argument(
        "--kernels", default="", help="compile only kernels whose names begin with this"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all values to FILE")
    args = parser.parse_args()
    try:
        reports = measure(args.gpu, args.kernels)
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1))
    print(timing.markdown_table(COLUMNS, to_rows(reports)))  # noqa: T201
    print(f"\ntriton {triton.__version__}, torch {torch.__version__}; compiled, not run.")  # noqa: T201


if __name__ == "__main__":
    main()
