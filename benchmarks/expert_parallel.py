"""Time a training step with experts spread over processes, and the exchange within it.

    python -m benchmarks.expert_parallel --ranks 1 2 4 --sentences 64 --length 25 --rounds 7

For each number of ranks, there is a separate group of processes, which communicate through gloo
over the loopback interface. The groups take turns; while one works, the others are idle. The same
number of sentences is divided among the ranks, and each rank holds its share of the experts. A step
is the same as in fairseq-train: forward pass, loss, backward pass, the sum of dense gradients
(legacy_ddp), clipping and Adam. The table shows the slowest rank's time for each part, including
the time spent waiting for others, and the bytes that a rank sends on average. For dense gradients,
these are the bytes that it would send in a ring all-reduce.
"""

import argparse
import multiprocessing
import shlex
import socket
import statistics
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from torch import distributed

from benchmarks import timing
from benchmarks.architectures import make_dictionary, parse_training
from benchmarks.traffic import measure_traffic
from benchmarks.train_step import TrainingStep, make_sample
from nmt_moe.models.lstm_moe_gnmt import LSTMMoEGNMTConfig
from nmt_moe.parallel import clip_gradients, ring_bytes, shard_group
from nmt_moe.trainer.data_parallel import ExpertParallelDataParallel

COLUMNS = [
    "ranks",
    "experts / rank",
    "parameters / rank",
    "tokens/s",
    "step ms",
    "spread",
    "exchange ms",
    "dense gradients ms",
    "exchange / step",
    "exchange MB",
    "dense gradients MB",
]
# The program gives up if a step takes longer than this many seconds.
PATIENCE = 600


class RankStep(TrainingStep):
    """One rank's part of a training step.

    Attributes:
        bytes_sent: Bytes sent in the last step, by kind.
    """

    def __init__(self, args: argparse.Namespace, rank: int, world_size: int) -> None:
        own = argparse.Namespace(**vars(args))
        own.sentences = args.sentences // world_size
        super().__init__(f"{args.arch}/{args.attention_wiring}", own)
        torch.manual_seed(args.seed + rank)  # for tokens, dropout and noise
        dictionary = make_dictionary(args.vocab_size)
        self.sample = make_sample(dictionary, own.sentences, args.length, self.device)
        self.parallel: Any = None
        if world_size > 1:
            self.parallel = ExpertParallelDataParallel(self.model, distributed.group.WORLD)
        dense = sum(p.nbytes for p in self.model.parameters() if shard_group(p) is None)
        self.bytes_sent = {"exchange": 0, "dense": ring_bytes(dense, world_size)}

    def __call__(self) -> dict[str, float]:
        """Do one update, and return how long the exchange and the sum of gradients took."""
        with measure_traffic() as traffic:
            loss, sample_size, _ = self.criterion(self.model, self.sample)
            self.optimizer.zero_grad(set_to_none=True)
            (loss / sample_size).backward()
        start = self._now()
        if self.parallel is not None:
            self.parallel.all_reduce_grads()
        end = self._now()
        clip_gradients(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.bytes_sent["exchange"] = traffic.bytes_sent["exchange"]
        return {"exchange": traffic.seconds["exchange"], "dense": end - start}


def run_rank(
    rank: int, world_size: int, port: int, args: argparse.Namespace, orders: Connection
) -> None:
    """Do a step for each command until told to stop, and send back times and bytes, or an error."""
    try:
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        if world_size > 1:
            address = f"tcp://127.0.0.1:{port}"
            distributed.init_process_group("gloo", address, rank=rank, world_size=world_size)
        step = RankStep(args, rank, world_size)
        moe = step.config.moe
        share = 0 if moe is None else moe.num_experts // world_size
        orders.send({"experts": share, "parameters": step.num_parameters})
        while orders.recv():
            seconds = step()
            orders.send({"seconds": seconds, "bytes": dict(step.bytes_sent)})
    except Exception:
        orders.send({"error": traceback.format_exc()})


class World:
    """The group of processes for one number of ranks.

    Attributes:
        shape: How many `experts` and `parameters` each rank holds.
        bytes_sent: How many bytes a rank sent on average in the last step, by kind.
    """

    def __init__(self, args: argparse.Namespace, world_size: int) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        self.ranks, self.orders = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = rank, world_size, port, args, theirs
            self.ranks.append(context.Process(target=run_rank, args=arguments, daemon=True))
            self.orders.append(ours)
        for process in self.ranks:
            process.start()
        self.shape: dict[str, int] = {}
        self.bytes_sent: dict[str, float] = {}

    def wait(self) -> None:
        """Wait until all ranks are ready."""
        self.shape = self._answers()[0]

    def __call__(self) -> dict[str, float]:
        """Do one step on all ranks, and return how many seconds each part took."""
        for orders in self.orders:
            orders.send(True)
        answers = self._answers()
        self.bytes_sent = {
            kind: statistics.mean(answer["bytes"][kind] for answer in answers)
            for kind in answers[0]["bytes"]
        }
        return {
            part: max(answer["seconds"][part] for answer in answers)
            for part in answers[0]["seconds"]
        }

    def stop(self) -> None:
        """End the processes."""
        for orders in self.orders:
            orders.send(False)
        for process in self.ranks:
            process.join(10)
            process.kill()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for rank, orders in enumerate(self.orders):
            answer = orders.recv() if orders.poll(PATIENCE) else {"error": f"{PATIENCE} s passed"}
            if "error" in answer:
                for process in self.ranks:
                    process.kill()
                sys.exit(f"rank {rank} of {len(self.ranks)} did not answer: {answer['error']}")
            answers.append(answer)
        return answers


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of ranks."""
    worlds = {str(count): World(args, count) for count in args.ranks}
    for world in worlds.values():  # all of them start up in parallel
        world.wait()
    samples = timing.interleave(worlds, args.rounds)
    rows = []
    for name, world in worlds.items():
        found = samples[name]
        rows.append(
            {
                "ranks": int(name),
                **world.shape,
                "step_seconds": found.seconds,
                "part_seconds": found.parts,
                "bytes_sent": world.bytes_sent,
                "tokens_per_second": args.sentences * args.length / found.median,
                "exchange_share": statistics.median(
                    part / whole
                    for part, whole in zip(found.parts["exchange"], found.seconds, strict=True)
                ),
            }
        )
        world.stop()
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Lay out the table."""
    lines = []
    for row in rows:
        found = timing.Samples(row["step_seconds"], row["part_seconds"])
        lines.append(
            [
                str(row["ranks"]),
                str(row["experts"]),
                f"{row['parameters'] / 1e6:.3g}M",
                f"{row['tokens_per_second']:.0f}",
                f"{found.median * 1e3:.0f}",
                f"{found.spread:.0%}",
                f"{found.part('exchange') * 1e3:.0f}",
                f"{found.part('dense') * 1e3:.0f}",
                f"{row['exchange_share']:.0%}",
                *(f"{row['bytes_sent'][kind] / 1e6:.2f}" for kind in ("exchange", "dense")),
            ]
        )
    return timing.markdown_table(COLUMNS, lines)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", default="lstm_moe_gnmt_small", help="architecture (lstm_moe_gnmt_small)"
    )
    parser.add_argument(
        "--attention-wiring",
        default="parallel",
        choices=["recurrent", "parallel"],
        help="attention wiring (parallel)",
    )
    parser.add_argument(
        "--model-flags",
        default="",
        metavar="FLAGS",
        help="more flags for the model, in one string",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes (1 2 4)"
    )
    parser.add_argument(
        "--sentences", type=int, default=64, help="number of sentences on all ranks together (64)"
    )
    parser.add_argument("--length", type=int, default=25, help="tokens per sentence (25)")
    parser.add_argument(
        "--vocab-size", type=int, default=8000, help="symbols in the vocabulary (8000)"
    )
    timing.add_common_flags(parser)
    parser.set_defaults(threads=1)
    args = parser.parse_args(argv)
    check(parser, args)
    timing.prepare(args)
    rows = measure(args)
    hardware = timing.describe_hardware(args.device, args.threads)
    print(format_rows(rows))
    print(
        f"\n{hardware} (threads are per rank); {args.arch}/{args.attention_wiring} "
        f"{args.model_flags}{' ' * bool(args.model_flags)}on a total of {args.sentences} "
        f"sentences of {args.length} tokens, {args.vocab_size} symbols, float32, gloo over the "
        f"loopback interface; medians of {args.rounds} interleaved rounds."
    )
    timing.write_json(args.json, args, hardware, rows)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject settings that cannot be measured, before any process starts."""
    if args.device != "cpu":
        parser.error("--device must be cpu, because the processes communicate by gloo")
    if "gnmt" not in args.arch or args.arch not in ARCH_MODEL_REGISTRY:
        parser.error(f"--arch: this plugin has no translation model {args.arch}")
    model_args = parse_training(args.arch, shlex.split(args.model_flags)).model
    moe = LSTMMoEGNMTConfig.to_config(model_args).moe
    divided = 1 if moe is None else moe.num_groups or moe.num_experts
    for count in args.ranks:
        if count < 1 or args.sentences % count or divided % count:
            parser.error(
                f"--ranks: {count} must be at least 1 and divide the {args.sentences} sentences "
                f"and the {divided} experts (or groups)"
            )


if __name__ == "__main__":
    main()
