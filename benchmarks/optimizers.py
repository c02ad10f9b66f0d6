"""Time an update of expert weights with factored Adam and with other implementations of Adam.

A layer of E experts has two weight tensors, (E, D, H) and (E, H, D), both with gradients. All
optimizers except factored Adam store two numbers for each weight.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import Parameter
from torch.optim import Adam, Optimizer

from benchmarks.timing import (
    add_common_flags,
    describe_hardware,
    interleave,
    markdown_table,
    prepare,
    write_json,
)
from nmt_moe.training import FactoredAdam

FACTORED = "nmt_moe factored"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=64, help="number of experts (64)")
    parser.add_argument("--dim", type=int, default=512, help="width of tokens (512)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden width of an expert (1024)")
    add_common_flags(parser)
    return parser


def optimizers() -> dict[str, Callable[[list[Parameter]], Optimizer]]:
    """Return each competitor's constructor, including fairseq's Adam if fairseq is installed."""
    found: dict[str, Callable[[list[Parameter]], Optimizer]] = {
        FACTORED: partial(FactoredAdam, factored=True),
        "torch fused": partial(Adam, fused=True),
        "torch foreach": partial(Adam, foreach=True),
        "torch plain": partial(Adam, foreach=False),
    }
    try:
        from fairseq.optim.adam import Adam as FairseqAdam
    except ImportError:
        return found
    return found | {"fairseq": FairseqAdam}


def make_parameters(args: argparse.Namespace) -> list[Parameter]:
    """Make the weights of one competitor, with gradients."""
    shapes = (args.experts, args.dim, args.hidden), (args.experts, args.hidden, args.dim)
    parameters = [Parameter(torch.randn(shape, device=args.device) * 0.1) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 0.01
    return parameters


def state_bytes(optimizer: Optimizer) -> int:
    """Return how many bytes an optimizer's state takes."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    prepare(args)
    if min(args.experts, args.dim, args.hidden) < 1:
        sys.exit("--experts, --dim and --hidden must be at least 1.")
    made = {name: make(make_parameters(args)) for name, make in optimizers().items()}
    samples = interleave({name: o.step for name, o in made.items()}, args.rounds, args.device)
    rows, ours = [], samples[FACTORED].median
    for name, found in samples.items():
        cells = f"{found.median * 1e3:.1f}", f"{found.spread:.0%}", f"{found.median / ours:.2f}"
        rows.append([name, *cells, f"{state_bytes(made[name]) / 1e6:.1f}"])
    hardware = describe_hardware(args.device, args.threads)
    print(markdown_table(["Adam", "update ms", "spread", "this / factored", "state MB"], rows))
    print(
        f"\n{hardware}; {args.experts} experts, {args.dim} x {args.hidden}, float32; medians of "
        f"{args.rounds} interleaved rounds."
    )
    kept = [{"optimizer": name, "seconds": found.seconds} for name, found in samples.items()]
    write_json(args.json, args, hardware, kept)


if __name__ == "__main__":
    main()
