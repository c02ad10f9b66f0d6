"""Time a softmax layer's loss and gradients, computed in full and by importance sampling.

A step computes the logits, the loss, and the gradients of features and weight; the sampled softmax
also draws its samples. The full and the sampled softmax both create a gradient as large as the
weight, because optimizers require one.
"""

import argparse
import sys
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import (
    Job,
    add_common_flags,
    describe_hardware,
    interleave,
    markdown_table,
    prepare,
    write_json,
)
from nmt_moe.training import draw_classes, sampled_nll


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--vocab-size",
        type=int,
        nargs="+",
        default=[100_000],
        help="sizes of the vocabulary (100000)",
    )
    parser.add_argument(
        "--draws", type=int, nargs="+", default=[8192], help="draws per step (8192)"
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens per step (256)")
    parser.add_argument("--dim", type=int, default=512, help="width of features (512)")
    add_common_flags(parser)
    return parser


def make_jobs(args: argparse.Namespace, vocab_size: int) -> Mapping[str, Job]:
    """Return a job for the full softmax, and one for each number of draws."""
    bound = args.dim**-0.5
    weight = torch.empty(vocab_size, args.dim, device=args.device).uniform_(-bound, bound)
    features = torch.randn(args.tokens, args.dim, device=args.device)
    # Draw targets from the same distribution as the samples.
    ranks = torch.rand(args.tokens, dtype=torch.float64, device=args.device)
    target = ((vocab_size + 1) ** ranks).long().sub(1).clamp(0, vocab_size - 1)
    weight.requires_grad_()
    features.requires_grad_()

    def finish(loss: Tensor) -> None:
        loss.backward()
        weight.grad = features.grad = None

    def full() -> None:
        finish(F.cross_entropy(features @ weight.t(), target, reduction="sum"))

    def sampled(draws: int) -> None:
        sample = draw_classes(draws, vocab_size, device=args.device)
        finish(sampled_nll(features, weight, target, sample).sum())

    return {"full": full, **{str(n): lambda n=n: sampled(n) for n in args.draws}}


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    prepare(args)
    too_many = max(args.draws) > min(args.vocab_size)
    if too_many or min(args.draws + [args.tokens, args.dim]) < 1:
        sys.exit(
            "--draws must be from 1 to the smallest --vocab-size, and --tokens and --dim must be "
            "at least 1."
        )
    rows, kept = [], []
    for vocab_size in args.vocab_size:
        samples = interleave(make_jobs(args, vocab_size), args.rounds, args.device)
        for name, found in samples.items():
            is_full = name == "full"
            classes = vocab_size if is_full else len(draw_classes(int(name), vocab_size).ids)
            rows.append(
                [
                    "full" if is_full else f"{name} draws",
                    f"{vocab_size:,}",
                    f"{classes:,}",
                    f"{found.median * 1e3:.1f}",
                    f"{found.spread:.0%}",
                    f"{samples['full'].median / found.median:.1f}",
                ]
            )
            kept.append({"softmax": name, "vocab_size": vocab_size, "seconds": found.seconds})
    hardware = describe_hardware(args.device, args.threads)
    columns = ["softmax", "vocabulary", "classes", "step ms", "spread", "full / this"]
    print(markdown_table(columns, rows))
    print(
        f"\n{hardware}; {args.tokens} tokens of width {args.dim}, float32; medians of "
        f"{args.rounds} interleaved rounds."
    )
    write_json(args.json, args, hardware, kept)


if __name__ == "__main__":
    main()
