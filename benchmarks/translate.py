"""Time fairseq-generate with lstm_moe_gnmt_small and with fairseq's lstm with the same widths.

    python -m benchmarks.translate --threads 2 --batch 32 --beam 5 --length 25 --rounds 7

As in fairseq-generate's report, only the generator is timed, on batches from fairseq's iterator.
With --command, the whole command is also timed. The models have random parameters, so every
hypothesis is forced to have --length tokens (min_len = max_len). All models therefore do the same
number of steps, and no batch shrinks. Source sentences have between --length / 2 and --length
tokens.

fairseq's lstm has the same embedding width, hidden size and number of decoder layers as
lstm_moe_gnmt_small. Its encoder must have as many layers as its decoder; both have two, as in
lstm_moe_gnmt_small. Both of its encoder layers are bidirectional, while only the bottom layer of
lstm_moe_gnmt_small is; fairseq's LSTMs have no projection. All models use the same dictionary,
sentences, batch and beam.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks, utils
from fairseq.data import indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import FairseqEncoderDecoderModel
from omegaconf import DictConfig, OmegaConf

from benchmarks import timing
from benchmarks.architectures import make_dictionary, parse_training, quiet
from nmt_moe.nn import WIRINGS

COLUMNS = ["model", "parameters", "sentences/s", "ms / step", "spread", "time / lstm's"]
PEER = "lstm"


def write_corpus(folder: Path, args: argparse.Namespace) -> None:
    """Write a binarised test set of random sentences, and the dictionary of both sides."""
    dictionary = make_dictionary(args.vocab_size)
    for language in ("src", "tgt"):
        dictionary.save(str(folder / f"dict.{language}.txt"))
        stem = folder / f"test.src-tgt.{language}"
        builder = indexed_dataset.make_builder(f"{stem}.bin", "mmap", vocab_size=len(dictionary))
        lengths = torch.randint((args.length + 1) // 2, args.length + 1, (args.sentences,))
        for length in lengths.tolist():
            tokens = torch.randint(dictionary.nspecial, len(dictionary), (length,))
            tokens[-1] = dictionary.eos()
            builder.add_item(tokens)
        builder.finalize(f"{stem}.idx")


def training_configs(folder: Path, args: argparse.Namespace) -> dict[str, DictConfig]:
    """Return fairseq-train's configuration for each competitor, by name."""
    flags = shlex.split(args.model_flags)
    configs = {}
    for wiring in args.attention_wiring:
        line = ["--attention-wiring", wiring, *flags]
        configs[f"{args.arch}/{wiring}"] = parse_training(args.arch, line, str(folder))
    ours = next(iter(configs.values())).model
    hidden = str(args.peer_hidden or ours.lstm_hidden_dim)
    dim = str(ours.model_dim)
    line = ["--encoder-embed-dim", dim, "--encoder-hidden-size", hidden, "--encoder-bidirectional"]
    line += ["--encoder-layers", str(ours.decoder_layers)]
    line += ["--decoder-embed-dim", dim, "--decoder-hidden-size", hidden]
    line += ["--decoder-layers", str(ours.decoder_layers), "--decoder-out-embed-dim", dim]
    configs[PEER] = parse_training(PEER, line, str(folder))
    return configs


def generation_line(folder: Path, checkpoint: Path, args: argparse.Namespace) -> list[str]:
    """Return fairseq-generate's arguments."""
    length = str(args.length)
    line = [str(folder), "--path", str(checkpoint), "--source-lang", "src", "--target-lang", "tgt"]
    line += ["--beam", str(args.beam), "--batch-size", str(args.batch)]
    line += ["--max-len-a", "0", "--max-len-b", length, "--min-len", length]
    return line + (["--cpu"] if args.device == "cpu" else [])


class Translation:
    """One model with fairseq's generator; each call translates all batches.

    Attributes:
        model: The model that the task builds from the flags.
        num_steps: How many steps the decoder does in a call.
    """

    def __init__(
        self, model: FairseqEncoderDecoderModel, folder: Path, args: argparse.Namespace
    ) -> None:
        line = generation_line(folder, folder / "none.pt", args)
        with quiet():
            config = convert_namespace_to_omegaconf(
                options.parse_args_and_arch(options.get_generation_parser(), line)
            )
            self.task = tasks.setup_task(config.task)
            self.task.load_dataset("test")
        self.model = model.to(args.device)
        self.model.prepare_for_inference_(config)
        self.generator = self.task.build_generator([self.model], config.generation)
        with quiet():
            batches = self.task.get_batch_iterator(
                dataset=self.task.dataset("test"),
                max_sentences=config.dataset.batch_size,
                required_batch_size_multiple=config.dataset.required_batch_size_multiple,
            )
            self.batches = list(batches.next_epoch_itr(shuffle=False))
        if args.device == "cuda":
            self.batches = [utils.move_to_cuda(batch) for batch in self.batches]
        # The step after the last token adds the end mark.
        self.num_steps = len(self.batches) * (args.length + 1)
        self.length = args.length

    def __call__(self) -> None:
        """Translate all batches once."""
        for batch in self.batches:
            found = self.task.inference_step(self.generator, [self.model], batch)
            # Times can be compared only if all models do the same work.
            assert all(len(best["tokens"]) == self.length + 1 for best, *_ in found)


def save_checkpoint(path: Path, config: DictConfig, model: torch.nn.Module) -> None:
    """Write the parts of a checkpoint that fairseq-generate reads."""
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(config, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "optimizer_history": [
            {"optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}
        ],
        "extra_state": {"train_iterator": {"epoch": 1}},
        "task_state": {},
    }
    torch.save(state, path)


def command_job(
    config: DictConfig, model: torch.nn.Module, path: Path, args: argparse.Namespace
) -> Callable[[], None]:
    """Make a job that runs the whole fairseq-generate command on a model."""
    save_checkpoint(path, config, model)
    line = [sys.executable, "-m", "fairseq_cli.generate"]
    line += generation_line(path.parent, path, args)
    line += ["--user-dir", str(timing.REPOSITORY / "nmt_moe")]

    def run() -> None:
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
        )
        if done.returncode:
            sys.exit(f"fairseq-generate failed:\n{done.stderr}")
        assert len(re.findall("^H-", done.stdout, re.MULTILINE)) == args.sentences

    return run


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each model, and with --command another for the whole command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, args)
        jobs: dict[str, Any] = {}
        sizes, num_steps = {}, {}
        for at, (model_name, config) in enumerate(training_configs(folder, args).items()):
            timing.say(f"building {model_name}")
            with quiet():
                model = tasks.setup_task(config.task).build_model(config.model)
            sizes[model_name] = sum(parameter.numel() for parameter in model.parameters())
            if args.command:
                label = f"{model_name}, command"
                jobs[label] = command_job(config, model, folder / f"{at}.pt", args)
                sizes[label] = sizes[model_name]
            jobs[model_name] = Translation(model, folder, args)
            num_steps[model_name] = jobs[model_name].num_steps
        samples = timing.interleave(jobs, args.rounds, args.device)
    rows = []
    for label, found in samples.items():
        is_command = label not in num_steps
        peer = samples[f"{PEER}, command" if is_command else PEER]
        rows.append(
            {
                "model": label,
                "parameters": sizes[label],
                "seconds": found.seconds,
                "sentences_per_second": args.sentences / found.median,
                "seconds_per_step": None if is_command else found.median / num_steps[label],
                "time_over_lstm": found.median / peer.median,
            }
        )
    return sorted(rows, key=lambda row: row["model"].endswith(", command"))


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Lay out the table."""
    lines = []
    for row in rows:
        step = row["seconds_per_step"]
        lines.append(
            [
                row["model"],
                f"{row['parameters'] / 1e6:.3g}M",
                f"{row['sentences_per_second']:.1f}",
                "-" if step is None else f"{step * 1e3:.2f}",
                f"{timing.Samples(row['seconds']).spread:.0%}",
                f"{row['time_over_lstm']:.2f}",
            ]
        )
    return timing.markdown_table(COLUMNS, lines)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        default="lstm_moe_gnmt_small",
        help="this project's architecture (lstm_moe_gnmt_small)",
    )
    parser.add_argument(
        "--attention-wiring",
        nargs="+",
        default=list(WIRINGS),
        choices=WIRINGS,
        help="attention wirings of --arch (both)",
    )
    parser.add_argument(
        "--model-flags",
        default="",
        metavar="FLAGS",
        help="more flags for --arch, in one string",
    )
    parser.add_argument(
        "--peer-hidden", type=int, metavar="N", help="hidden size of fairseq's lstm (as in --arch)"
    )
    parser.add_argument("--sentences", type=int, default=64, help="sentences to translate (64)")
    parser.add_argument("--batch", type=int, default=32, help="sentences per batch (32)")
    parser.add_argument("--beam", type=int, default=5, help="beam size (5)")
    parser.add_argument("--length", type=int, default=25, help="tokens per translation (25)")
    parser.add_argument(
        "--vocab-size", type=int, default=8000, help="symbols in the vocabulary (8000)"
    )
    parser.add_argument("--command", action="store_true", help="also time the whole command")
    timing.add_common_flags(parser)
    args = parser.parse_args(argv)
    timing.prepare(args)
    rows = measure(args)
    hardware = timing.describe_hardware(args.device, args.threads)
    print(format_rows(rows))
    print(
        f"\n{hardware}; {args.sentences} sentences in batches of {args.batch}, beam {args.beam}, "
        f"{args.length} tokens per translation, {args.vocab_size} symbols, float32; "
        f"medians of {args.rounds} interleaved rounds."
    )
    timing.write_json(args.json, args, hardware, rows)


if __name__ == "__main__":
    main()
