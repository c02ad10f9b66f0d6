"""Time fairseq-generate with fairseq's own search and with GNMT's, on a trained model.

    python -m benchmarks.search --checkpoint average.pt --data data-bin --subset valid --threads 1

The program compares fairseq's own search ("stock") with GNMT's penalties, with GNMT's pruning and
with both together. The options have GNMT's values. As in fairseq-generate's report, only the
generator is timed, on batches from fairseq's own iterator, which sorts sentences by length.
Translations have their natural lengths, so the model must be trained. A random model assigns
similar scores to all hypotheses, so nothing would be pruned.

`steps` counts calls of the decoder, and `hypotheses` counts those evaluated in these calls. `same`
is the share of sentences whose best translation is the same as with "stock" or, for penalties with
pruning, as with "penalties". `BLEU` is computed on pieces, with the binarised targets as
references, so use it only to compare the searches with each other.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig

from benchmarks import timing
from benchmarks.architectures import quiet

COLUMNS = [
    "search",
    "sentences/s",
    "steps",
    "hypotheses",
    "spread",
    "time / stock's",
    "same",
    "BLEU",
]
STOCK = "stock"
# The penalties and the margin have GNMT's values.
PENALTIES = ["--length-penalty-alpha", "0.2", "--coverage-penalty-beta", "0.2"]
PRUNING = ["--beam-prune", "3.0"]
SEARCHES = {
    STOCK: [],
    "penalties": PENALTIES,
    "pruning": PRUNING,
    "penalties, pruning": PENALTIES + PRUNING,
}


class Data:
    """A trained model and the batches it translates.

    Attributes:
        model: The model, as fairseq-generate loads it.
        batches: The batches of one subset.
        targets: The reference of each sentence, by sentence number.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        config = generation_config(args, [])
        with quiet():
            self.task = tasks.setup_task(config.task)
            models, _ = checkpoint_utils.load_model_ensemble([str(args.checkpoint)], task=self.task)
            self.task.load_dataset(args.subset)
            (self.model,) = models
            self.model.to(args.device).prepare_for_inference_(config)
            dataset = self.task.dataset(args.subset)
            batches = self.task.get_batch_iterator(
                dataset=dataset,
                max_sentences=args.batch,
                required_batch_size_multiple=config.dataset.required_batch_size_multiple,
            )
            self.batches = list(batches.next_epoch_itr(shuffle=False))
        if args.device == "cuda":
            self.batches = [utils.move_to_cuda(batch) for batch in self.batches]
        self.targets = {
            number: self.text(target[target.ne(self.task.target_dictionary.pad())])
            for batch in self.batches
            for number, target in zip(batch["id"].tolist(), batch["target"], strict=True)
        }

    def text(self, tokens: torch.Tensor) -> str:
        """Return the pieces of tokens, separated by spaces."""
        return self.task.target_dictionary.string(tokens)


class Search:
    """One search on the model; each call translates all batches.

    Attributes:
        num_steps: How many steps the decoder took.
        num_rows: How many hypotheses were evaluated in these steps.
        best: The best translation of each sentence, by sentence number.
    """

    def __init__(self, data: Data, config: DictConfig) -> None:
        self.data = data
        self.generator = data.task.build_generator([data.model], config.generation)
        self.num_steps = self.num_rows = 0
        self.best: dict[int, str] = {}

    def __call__(self) -> None:
        """Translate all batches once."""
        for batch in self.data.batches:
            self.data.task.inference_step(self.generator, [self.data.model], batch)

    def count(self) -> None:
        """Translate all batches, and record the counts and the best translations."""
        decoder = self.data.model.decoder
        forward = decoder.forward

        def counting(prev_output_tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.num_steps += 1
            self.num_rows += len(prev_output_tokens)
            return forward(prev_output_tokens, *args, **kwargs)

        # fairseq calls `forward` directly, so hooks would not run.
        decoder.forward = counting
        try:
            for batch in self.data.batches:
                found = self.data.task.inference_step(self.generator, [self.data.model], batch)
                for number, (best, *_) in zip(batch["id"].tolist(), found, strict=True):
                    self.best[number] = self.data.text(best["tokens"])
        finally:
            del decoder.forward


def generation_config(args: argparse.Namespace, flags: Sequence[str]) -> DictConfig:
    """Return fairseq-generate's configuration for the flags of a search."""
    line = [str(args.data), "--path", str(args.checkpoint), "--gen-subset", args.subset]
    line += ["--beam", str(args.beam), "--batch-size", str(args.batch), *flags]
    with quiet():
        return convert_namespace_to_omegaconf(
            options.parse_args_and_arch(options.get_generation_parser(), line)
        )


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each search."""
    data = Data(args)
    jobs = {name: Search(data, generation_config(args, flags)) for name, flags in SEARCHES.items()}
    for name, job in jobs.items():
        timing.say(f"counting: {name}")
        job.count()
    samples = timing.interleave(jobs, args.rounds, args.device)
    numbers = sorted(data.targets)
    references = [[data.targets[number] for number in numbers]]
    rows = []
    for name, job in jobs.items():
        unpruned = jobs["penalties" if "penalties" in name else STOCK]
        best = [job.best[number] for number in numbers]
        same = sum(job.best[number] == unpruned.best[number] for number in numbers)
        bleu = sacrebleu.corpus_bleu(best, references, tokenize="none", force=True)
        rows.append(
            {
                "search": name,
                "seconds": samples[name].seconds,
                "sentences_per_second": len(numbers) / samples[name].median,
                "steps": job.num_steps,
                "rows": job.num_rows,
                "time_over_stock": samples[name].median / samples[STOCK].median,
                "same": same / len(numbers),
                "bleu": bleu.score,
            }
        )
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Lay out the table."""
    lines = [
        [
            row["search"],
            f"{row['sentences_per_second']:.1f}",
            f"{row['steps']:,}",
            f"{row['rows']:,}",
            f"{timing.Samples(row['seconds']).spread:.0%}",
            f"{row['time_over_stock']:.2f}",
            f"{row['same']:.1%}",
            f"{row['bleu']:.2f}",
        ]
        for row in rows
    ]
    return timing.markdown_table(COLUMNS, lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="checkpoint of a trained model",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DATA-BIN", help="binarised data of the model"
    )
    parser.add_argument("--subset", default="valid", help="subset of the data (valid)")
    parser.add_argument("--batch", type=int, default=64, help="sentences per batch (64)")
    parser.add_argument("--beam", type=int, default=5, help="beam size (5)")
    timing.add_common_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    args = parse(argv)
    timing.prepare(args)
    for flag, path in (("--checkpoint", args.checkpoint), ("--data", args.data)):
        if not path.exists():
            sys.exit(f"{flag}: {path} does not exist. Train a model first, as the recipes do.")
    rows = measure(args)
    hardware = timing.describe_hardware(args.device, args.threads)
    print(format_rows(rows))
    print(
        f"\n{hardware}; {args.subset} of {args.data.name}, batches of {args.batch} sentences, beam "
        f"{args.beam}, penalties {' '.join(PENALTIES)}, pruning {' '.join(PRUNING)}, float32; "
        f"medians of {args.rounds} interleaved rounds."
    )
    timing.write_json(args.json, args, hardware, rows)


if __name__ == "__main__":
    main()
