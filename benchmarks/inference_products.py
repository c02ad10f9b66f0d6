"""Time the kinds of matrix product that `kernels/quantised.py` chooses from for inference.

    python -m benchmarks.inference_products --threads 1 --rounds 5

Each line of the table is for one matrix (outputs x inputs) and one number of activation rows.
The figures are CPU times in microseconds, including the quantisation of activations. Each product
cycles through copies of its matrix. Between two uses of a copy, it therefore reads as many bytes of
weights as a real model reads between two uses of a matrix.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from nmt_moe.kernels import PackedLinear, quantise_rows
from nmt_moe.kernels.quantised import DTYPES

SHAPES = ("256x64", "1024x256", "8000x256", "2048x512", "512x2048", "8192x512", "32000x512")
Product = Callable[[Tensor], Tensor]


def blas(weight: Tensor) -> Product:
    """Multiply with torch's linear layer."""
    return lambda x: F.linear(x, weight)


def blas_transposed(weight: Tensor) -> Product:
    """Multiply by a transposed copy of the matrix."""
    weight = weight.t().contiguous()
    return lambda x: torch.mm(x, weight)


def onednn(weight: Tensor) -> Product:
    """Multiply by weights in oneDNN's layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def fbgemm_half(weight: Tensor) -> Product:
    """Multiply by weights that FBGEMM has packed in half precision."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def onednn_bfloat16(weight: Tensor) -> Product:
    """Multiply by bfloat16 weights in oneDNN's layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x.bfloat16(), packed, None, "none", [], "").float()


def onednn_int8(weight: Tensor) -> Product:
    """Multiply by int8 weights in oneDNN's layout."""
    levels, scale = quantise_rows(weight)
    packed = torch.ops.onednn.qlinear_prepack(levels, None)
    arguments = packed, scale, torch.zeros(len(scale), dtype=torch.int64), None, 1.0, 0
    multiply = torch.ops.onednn.qlinear_pointwise

    def product(x: Tensor) -> Tensor:
        quantised, row_scale = quantise_rows(x)
        y = multiply(quantised, 1.0, 0, *arguments, torch.float32, "none", [], "")
        return y.mul_(row_scale.unsqueeze(1))

    return product


def int_mm(weight: Tensor) -> Product:
    """Multiply in int8 with `torch._int_mm`."""
    levels, scale = quantise_rows(weight)
    levels = levels.t()

    def multiply(x: Tensor) -> Tensor:
        quantised, row_scale = quantise_rows(x)
        return torch._int_mm(quantised, levels).float().mul_(row_scale.unsqueeze(1)).mul_(scale)

    return multiply


CONTENDERS: dict[str, Callable[[Tensor], Product]] = {
    "linear": blas,
    "transposed": blas_transposed,
    "oneDNN": onednn,
    "FBGEMM half": fbgemm_half,
    "oneDNN bfloat16": onednn_bfloat16,
    "oneDNN int8": onednn_int8,
    "_int_mm": int_mm,
    **{
        f"ours, {dtype}": lambda w, dtype=dtype: PackedLinear.pack(w, None, dtype)
        for dtype in DTYPES
    },
}


def microseconds(
    shape: tuple[int, int], rows: int, rounds: int, cache_bytes: int
) -> dict[str, float]:
    """Return the median CPU time of each contender's product."""
    copies = max(1, cache_bytes // (4 * shape[0] * shape[1]))
    x = torch.randn(rows, shape[1])
    calls = {}
    for name, make in CONTENDERS.items():
        if not runs_here(name):
            continue
        if name == "_int_mm" and rows * shape[0] * shape[1] > 1 << 26 and not has_vnni():
            continue  # without VNNI, `_int_mm` is a plain C loop
        products = [make(torch.randn(shape) * 0.05) for _ in range(copies)]
        for product in products:
            product(x)  # this project's products pack their weights on the first call
        calls[name] = cycle(products).__next__
    found: dict[str, list[float]] = {name: [] for name in calls}
    for at in range(-1, rounds):
        for name, following in calls.items():
            start, count = time.process_time(), 0
            while count < 2 or time.process_time() - start < 0.005:
                following()(x)
                count += 1
            if at >= 0:
                found[name].append((time.process_time() - start) / count * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def runs_here(name: str) -> bool:
    """Return whether the processor has the instructions that a contender needs to be correct."""
    if name == "oneDNN bfloat16":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # Without VNNI, oneDNN adds products of bytes in 16 bits, with saturation.
    return name != "oneDNN int8" or has_vnni()


def has_vnni() -> bool:
    """Return whether the processor has AVX-512, and so probably VNNI (sums of byte products)."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="OxI", help="sizes of matrices"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 5, 64, 320], help="numbers of activation rows"
    )
    parser.add_argument(
        "--cache",
        type=int,
        default=64,
        help="MiB of float32 weights read between two uses of a matrix (64)",
    )
    timing.add_common_flags(parser)
    args = parser.parse_args(argv)
    timing.prepare(args)
    rows = []
    with torch.inference_mode():
        for text in args.shapes:
            outputs, inputs = map(int, text.split("x"))
            for batch in args.batch:
                timing.say(f"{text}, {batch} rows")
                found = microseconds((outputs, inputs), batch, args.rounds, args.cache << 20)
                rows.append({"shape": text, "rows": batch, **found})
    lines = [
        [
            f"{row['shape']}, {row['rows']}",
            *(f"{row[n]:.0f}" if n in row else "-" for n in CONTENDERS),
        ]
        for row in rows
    ]
    hardware = timing.describe_hardware("cpu", args.threads)
    print(timing.markdown_table(["matrix, rows", *CONTENDERS], lines))
    print(f"\n{hardware}; CPU times in microseconds, medians of {args.rounds} interleaved rounds.")
    timing.write_json(args.json, args, hardware, rows)


if __name__ == "__main__":
    main()
