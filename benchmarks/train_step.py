"""Time a training step, and compare it with the bare matrix products that it requires.

    python -m benchmarks.train_step --threads 2 --sentences 64 --length 25 --rounds 7

A step consists of a forward pass, the loss, a backward pass and Adam, on random sentences of one
length, with the model, the criterion and the Adam that fairseq-train would use. All models, and
each model's products (see products.py), take turns in one process. Peak memory is measured over two
steps in a separate process, and excludes the memory that the libraries take. Only target tokens are
counted; there are as many source tokens.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.optim.adam import Adam
from torch import Tensor

from benchmarks import products, timing
from benchmarks.architectures import make_dictionary, parse_training
from nmt_moe.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropy
from nmt_moe.models.lstm_moe_gnmt import LSTMMoEGNMTConfig
from nmt_moe.nn import WIRINGS
from nmt_moe.planning import Batch

COLUMNS = [
    "model",
    "parameters",
    "tokens/s",
    "step ms",
    "spread",
    "forward",
    "backward",
    "Adam",
    "products ms",
    "step / products",
    "GFLOP/s",
    "peak MB",
]


class TrainingStep:
    """One model with its optimizer and one batch; each call is one update.

    Attributes:
        config: The model's configuration.
        num_parameters: How many parameters the model has; shared ones are counted once.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        arch, wiring = name.split("/")
        flags = ["--attention-wiring", wiring, *shlex.split(args.model_flags)]
        model_args = parse_training(arch, flags).model
        dictionary = make_dictionary(args.vocab_size)
        task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
        model_class = ARCH_MODEL_REGISTRY[arch]
        torch.manual_seed(args.seed)
        self.device = args.device
        self.config = LSTMMoEGNMTConfig.to_config(model_args)
        self.model = model_class.build_model(model_args, task).to(args.device).train()
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.criterion = MoELabelSmoothedCrossEntropy(task, False, 0.1).to(args.device)
        self.optimizer = Adam(self.model.parameters(), lr=1e-4, betas=(0.9, 0.98))
        self.sample = make_sample(dictionary, args.sentences, args.length, args.device)

    def __call__(self) -> dict[str, float]:
        """Do one update, and return how many seconds each part took."""
        marks = [self._now()]
        loss, sample_size, _ = self.criterion(self.model, self.sample)
        marks.append(self._now())
        self.optimizer.zero_grad(set_to_none=True)
        (loss / sample_size).backward()
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        parts = ["forward", "backward", "Adam"]
        return {part: marks[at + 1] - marks[at] for at, part in enumerate(parts)}

    def _now(self) -> float:
        timing.synchronise(self.device)
        return time.perf_counter()


def make_sample(dictionary: Dictionary, sentences: int, length: int, device: str) -> dict[str, Any]:
    """Make a batch of random sentences, (B, length) on both sides, as fairseq's collater would."""
    tokens = torch.randint(dictionary.nspecial, len(dictionary), (2, sentences, length))
    tokens[:, :, -1] = dictionary.eos()
    source, target = tokens.to(device)
    sample: dict[str, Any] = {
        "id": torch.arange(sentences),
        "ntokens": sentences * length,
        "target": target,
        "net_input": {
            "src_tokens": source,
            "src_lengths": torch.full((sentences,), length, device=device),
            "prev_output_tokens": _shift(target),
        },
    }
    return sample


def _shift(target: Tensor) -> Tensor:
    """Move the last symbol to the front, as in fairseq's decoder inputs."""
    return torch.roll(target, 1, dims=1)


def measure_memory(names: list[str], args: argparse.Namespace) -> dict[str, int]:
    """Return each model's peak memory in bytes, measured in a separate process per model."""
    peaks = {}
    for name in names:
        timing.say(f"memory: {name}")
        command = [sys.executable, "-m", "benchmarks.train_step", "--memory-of", name]
        for flag in ("sentences", "length", "vocab_size", "threads", "device", "seed"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        command.append(f"--model-flags={args.model_flags}")
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=timing.REPOSITORY)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    return peaks


def print_memory(name: str, args: argparse.Namespace) -> None:
    """Do two steps (the first creates Adam's state), and print their peak memory."""
    tiny = argparse.Namespace(**vars(args))
    tiny.sentences, tiny.length, tiny.vocab_size = 1, 2, 8
    sizes = ("--model-dim", "--lstm-hidden-dim", "--expert-hidden-dim")
    tiny.model_flags += "".join(f" {flag} 8" for flag in sizes)
    TrainingStep(name, tiny)()  # loads libraries, which are not part of the model's memory
    before = timing.peak_bytes(args.device)
    step = TrainingStep(name, args)
    step()
    step()
    print(json.dumps({"peak_bytes": timing.peak_bytes(args.device) - before}))


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """Return a row per model, and the operations of each model's products by group."""
    names = [f"{arch}/{wiring}" for arch in args.arch for wiring in args.attention_wiring]
    # Measure memory first, while this process is small, because its child processes need memory.
    peaks = {} if args.no_memory else measure_memory(names, args)
    batch = Batch(args.sentences, args.length, args.vocab_size)
    pool = products.Pool(args.device)
    steps, jobs, bare = {}, {}, {}
    for name in names:
        timing.say(f"building {name}")
        steps[name] = jobs[name] = TrainingStep(name, args)
        bare[name] = products.model_products(steps[name].config, batch)
        jobs[f"{name} products"] = products.BareProducts(bare[name], pool)
    samples = timing.interleave(jobs, args.rounds, args.device)
    rows = []
    for name in names:
        whole, limit = samples[name], samples[f"{name} products"]
        rows.append(
            {
                "model": name,
                "parameters": steps[name].num_parameters,
                "target_tokens": batch.tokens,
                "flops": products.training_flops(bare[name]),
                "step_seconds": whole.seconds,
                "part_seconds": whole.parts,
                "products_seconds": limit.seconds,
                "tokens_per_second": batch.tokens / whole.median,
                "step_over_products": whole.median / limit.median,
                "peak_bytes": peaks.get(name),
            }
        )
    return rows, {name: products.flops_by_group(bare[name]) for name in names}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Lay out the main table."""
    lines = []
    for row in rows:
        whole = timing.Samples(row["step_seconds"], row["part_seconds"])
        limit = timing.Samples(row["products_seconds"])
        peak = row["peak_bytes"]
        lines.append(
            [
                row["model"],
                f"{row['parameters'] / 1e6:.3g}M",
                f"{row['tokens_per_second']:.0f}",
                f"{whole.median * 1e3:.0f}",
                f"{whole.spread:.0%}",
                *(f"{whole.part(part) * 1e3:.0f}" for part in ("forward", "backward", "Adam")),
                f"{limit.median * 1e3:.0f}",
                f"{row['step_over_products']:.2f}",
                f"{row['flops'] / limit.median / 1e9:.0f}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    return timing.markdown_table(COLUMNS, lines)


def format_groups(groups: dict[str, dict[str, int]]) -> str:
    """Lay out the GFLOP of each model's products by group."""
    names = list(dict.fromkeys(group for totals in groups.values() for group in totals))
    lines = []
    for model, totals in groups.items():
        values = [totals.get(name, 0) for name in names]
        lines.append([model, *(f"{value / 1e9:.3g}" for value in [*values, sum(values)])])
    return timing.markdown_table(["GFLOP of a step", *names, "all"], lines)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        default=["lstm_moe_gnmt", "lstm_gnmt"],
        metavar="ARCH",
        help="architectures (lstm_moe_gnmt lstm_gnmt); others: lstm_moe_gnmt_small lstm_gnmt_small",
    )
    parser.add_argument(
        "--attention-wiring",
        nargs="+",
        default=list(WIRINGS),
        choices=WIRINGS,
        help="attention wirings of each architecture (both)",
    )
    parser.add_argument(
        "--model-flags",
        default="",
        metavar="FLAGS",
        help="more flags for every model, in one string",
    )
    parser.add_argument("--sentences", type=int, default=64, help="sentences per batch (64)")
    parser.add_argument("--length", type=int, default=25, help="tokens per sentence (25)")
    parser.add_argument(
        "--vocab-size", type=int, default=32000, help="symbols in the vocabulary (32000)"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    timing.add_common_flags(parser)
    args = parser.parse_args(argv)
    unknown = [arch for arch in args.arch if arch not in ARCH_MODEL_REGISTRY]
    if unknown:
        parser.error(f"--arch: neither fairseq nor this plugin has {', '.join(unknown)}")
    timing.prepare(args)
    if args.memory_of:
        print_memory(args.memory_of, args)
        return
    rows, groups = measure(args)
    hardware = timing.describe_hardware(args.device, args.threads)
    print(format_rows(rows))
    print(f"\n{format_groups(groups)}\n")
    print(
        f"{hardware}; {args.sentences} sentences of {args.length} tokens each, {args.vocab_size} "
        f"symbols, float32; medians of {args.rounds} interleaved rounds."
    )
    timing.write_json(args.json, args, hardware, rows)


if __name__ == "__main__":
    main()
