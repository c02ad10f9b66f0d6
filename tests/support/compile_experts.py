"""Compile the kernels of dispatch, experts and combine as launched; print a report by name."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch

from nmt_moe.kernels._triton import combine_rows, gather_rows, grouped_gemm
from tests.support.compile_triton import CAPABILITIES, compile_launch

DIM, HIDDEN, EXPERTS = 512, 1024, 4
# Mean rows per expert that lead to small, middle and large blocks in bfloat16, the usual dtype.
MEANS = {
    torch.bfloat16: (16, 128, 1024),
    torch.float16: (1024,),
    torch.float32: (1024,),
}

Launch = tuple[str, ModuleType, str, Callable[[], object]]


def row_launches(dtype: torch.dtype) -> Iterator[Launch]:
    x, gates = torch.empty(10, DIM, dtype=dtype), torch.empty(10, 4, dtype=dtype)
    ids = torch.empty(10, 4, dtype=torch.int64)
    yield "gather", gather_rows, "_gather_kernel", partial(gather_rows.gather_rows, x, ids[0])
    yield "sum", gather_rows, "_sum_kernel", partial(gather_rows.sum_rows, x, ids, gates)
    backward = partial(combine_rows.combine_rows_backward, x, x, gates, ids)
    yield "combine_backward", combine_rows, "_combine_backward_kernel", backward


def product_launches(dtype: torch.dtype, mean: int) -> Iterator[Launch]:
    num_rows = mean * EXPERTS
    rows = torch.empty(num_rows, DIM, dtype=dtype)
    hidden = torch.empty(num_rows, HIDDEN, dtype=dtype)
    weight_in = torch.empty(EXPERTS, DIM, HIDDEN, dtype=dtype)
    weight_out = torch.empty(EXPERTS, HIDDEN, DIM, dtype=dtype)
    offsets = torch.arange(EXPERTS + 1) * mean
    block_rows = grouped_gemm.choose_block_rows(num_rows, EXPERTS, dtype)
    tiles = grouped_gemm.list_tiles(offsets, num_rows, block_rows)
    multiply = partial(grouped_gemm.multiply_rows, expert_offsets=offsets, tiles=tiles)
    back = partial(multiply, rows, weight_out.transpose(1, 2), mask=hidden)
    gradient = partial(grouped_gemm.weight_gradient, rows, hidden, offsets, block_rows)
    zero = partial(grouped_gemm.zero_idle_experts, weight_in, offsets)
    forward = partial(multiply, rows, weight_in, relu=True)
    yield f"multiply {mean}", grouped_gemm, "multiply_kernel", forward
    yield f"multiply_back {mean}", grouped_gemm, "multiply_kernel", back
    yield f"weight_gradient {mean}", grouped_gemm, "weight_gradient_kernel", gradient
    yield "zero", grouped_gemm, "zero_kernel", zero


def main() -> None:
    reports = {}
    for gpu in CAPABILITIES:
        for dtype, means in MEANS.items():
            launches = list(row_launches(dtype))
            for mean in means:
                launches += product_launches(dtype, mean)
            for name, module, kernel, launch in launches:
                key = f"{gpu} {str(dtype).removeprefix('torch.')} {name}"
                reports[key] = compile_launch(module, kernel, gpu, launch)
    print(json.dumps(reports))  # noqa: T201


if __name__ == "__main__":
    main()
