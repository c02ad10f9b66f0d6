"""Time this project's float32 matrix multiplication for training, side by side with torch's.

    python -m benchmarks.training_products --threads 1 --rounds 7

Each size is a batch of C products of (M, K) and (K, N) matrices. The right or the left side may be
a transposed view, as in a backward pass. Which implementation, this project's or torch's, is used
in training depends on the processor (`nmt_moe/kernels/_cpu/products.cpp`); both are timed here on
any processor.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import timing
from nmt_moe.kernels import compiled_operators

SIZES = ("1x2048x128x1024", "4x16x512x1024", "4x128x512x1024", "1x4096x512x2048")
LAYOUTS = ("plain", "right transposed", "left transposed")
# Minimum number of operations in a timed call, so that it takes a few milliseconds.
OPERATIONS = 1 << 29


def make_operands(size: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the left side (C, M, K), the right side (C, K, N) and an empty result (C, M, N)."""
    batches, rows, inner, columns = size
    left, right = torch.randn(batches, rows, inner), torch.randn(batches, inner, columns)
    if layout == "right transposed":
        right = right.mT.contiguous().mT
    elif layout == "left transposed":
        left = left.mT.contiguous().mT
    return left, right, torch.empty(batches, rows, columns)


def measure(size: tuple[int, ...], layout: str, rounds: int) -> dict[str, float]:
    """Return the median GFLOP/s of "ours" and "torch"."""
    left, right, out = make_operands(size, layout)
    operations = 2 * size[0] * size[1] * size[2] * size[3]
    calls = max(1, OPERATIONS // operations)

    def repeat(product: Callable[[], object]) -> Callable[[], None]:
        def job() -> None:
            for _ in range(calls):
                product()

        return job

    samples = timing.interleave(
        {
            "ours": repeat(
                lambda: compiled_operators().multiply_matrices(left, right, out, False, False)
            ),
            "torch": repeat(lambda: torch.bmm(left, right, out=out)),
        },
        rounds,
    )
    return {name: operations * calls / one.median / 1e9 for name, one in samples.items()}


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, metavar="CxMxKxN", help="sizes of products"
    )
    timing.add_common_flags(parser)
    args = parser.parse_args(argv)
    timing.prepare(args)
    if compiled_operators() is None:
        parser.error("the loops have not been compiled. Run python -m nmt_moe.kernels._cpu.build.")
    rows, lines = [], []
    for text in args.sizes:
        size = tuple(map(int, text.split("x")))
        for layout in LAYOUTS:
            found = measure(size, layout, args.rounds)
            ratio = found["ours"] / found["torch"]
            rows.append({"size": text, "layout": layout, **found})
            lines.append(
                [text, layout, *(f"{value:.0f}" for value in found.values()), f"{ratio:.2f}"]
            )
    hardware = timing.describe_hardware("cpu", args.threads)
    print(timing.markdown_table(["size", "layout", "ours", "torch", "ours / torch"], lines))
    print(f"\n{hardware}; GFLOP/s, medians of {args.rounds} interleaved rounds.")
    timing.write_json(args.json, args, hardware, rows)


if __name__ == "__main__":
    main()
