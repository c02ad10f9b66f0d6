"""Time translation by fairseq's own commands, by bundles in every precision, and by CTranslate2.

    python -m benchmarks.inference --data data-bin --checkpoint average.pt --pieces spm.model
        --bundles en-de en-de-bfloat16 en-de-int8 --threads 2 --rounds 7

All competitors translate the test split of --data with the same beam and limits. With `batch`, the
split is translated as fast as possible, and each competitor sorts sentences by length in its own
way; with `one`, sentences are translated one after another. For fairseq, only the generator is
timed, as in fairseq-generate's report; reading text and splitting it into pieces are excluded. For
bundles and CTranslate2, everything from raw text to raw text is timed. With --interactive,
fairseq-interactive is also measured, in a process that is started beforehand and receives each line
after it has translated the previous one. Start-up is measured separately.

CPU times are shown as well, because they are more reliable on a shared machine. --ctranslate2 names
converted models with the same pieces, such as a Transformer trained by fairseq on the same text;
the module ctranslate2 must be importable (PYTHONPATH).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from sentencepiece import SentencePieceProcessor

from benchmarks import timing
from benchmarks.architectures import quiet
from nmt_moe.inference import Translator

COLUMNS = [
    *("translator", "sentences", "ms / sentence", "speed-up"),
    *("CPU ms / sentence", "CPU speed-up", "BLEU"),
]
FAIRSEQ = "fairseq"
INTERACTIVE = "fairseq-interactive"
ANSWER = "D-"  # begins fairseq-interactive's last line for a sentence
LOAD = """
import json, sys, time
start = time.perf_counter()
import torch
imported = time.perf_counter()
from nmt_moe import Translator
Translator.load(sys.argv[1])
end = time.perf_counter()
print(json.dumps([end - start, end - imported]))
"""


class FairseqTranslator:
    """A checkpoint with fairseq's generator.

    Attributes:
        sources: The sentences of the test split as raw text.
        references: A reference translation of each sentence.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        line = [str(args.data), "--path", str(args.checkpoint), "--beam", str(args.beam), "--cpu"]
        if args.max_length:
            line += ["--max-len-a", "0", "--max-len-b", str(args.max_length)]
        with quiet():
            config = convert_namespace_to_omegaconf(
                options.parse_args_and_arch(options.get_generation_parser(), line)
            )
            self.task = tasks.setup_task(config.task)
            [self.model], _ = checkpoint_utils.load_model_ensemble(
                [str(args.checkpoint)], task=self.task
            )
            self.task.load_dataset("test")
        self.model.prepare_for_inference_(config)
        self.generator = self.task.build_generator([self.model], config.generation)
        self.dataset = self.task.dataset("test")
        self.remove = "sentencepiece" if args.pieces else None
        count = min(args.sentences, len(self.dataset))
        pairs = [self.dataset[index] for index in range(count)]
        self.sources = [
            self.task.source_dictionary.string(pair["source"], self.remove) for pair in pairs
        ]
        self.references = [self._text(pair["target"]) for pair in pairs]

    def _text(self, tokens: torch.Tensor) -> str:
        return self.task.target_dictionary.string(tokens, self.remove)

    def job(self, count: int, batch_size: int) -> Callable[[], list[str]]:
        """Return a job that translates the first `count` sentences in batches of `batch_size`."""
        by_length = sorted(range(count), key=self.dataset.size)
        batches = [
            self.dataset.collater([self.dataset[index] for index in by_length[i : i + batch_size]])
            for i in range(0, count, batch_size)
        ]

        def run() -> list[str]:
            texts = [""] * count
            for batch in batches:
                found = self.task.inference_step(self.generator, [self.model], batch)
                for index, (best, *_) in zip(batch["id"].tolist(), found, strict=True):
                    texts[index] = self._text(best["tokens"])
            return texts

        return run


class InteractiveCommand:
    """A fairseq-interactive process that is given one sentence at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        line = [sys.executable, "-m", "fairseq_cli.interactive", str(args.data), "--cpu"]
        line += ["--path", str(args.checkpoint), "--beam", str(args.beam), "--buffer-size", "1"]
        if args.max_length:
            line += ["--max-len-a", "0", "--max-len-b", str(args.max_length)]
        if args.pieces:
            line += ["--bpe", "sentencepiece", "--sentencepiece-model", str(args.pieces)]
        line += ["--user-dir", str(timing.REPOSITORY / "nmt_moe")]
        threads = {"OMP_NUM_THREADS": str(args.threads), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **threads},
        )

    def translate(self, sources: list[str]) -> list[str]:
        """Translate sentences, one after another."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        texts = []
        for source in sources:
            print(source, file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                if line.startswith(ANSWER):
                    texts.append(line.rstrip("\n").split("\t")[2])
                    break
            else:
                raise RuntimeError(f"{INTERACTIVE} ended with status {self._process.wait()}.")
        return texts

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def bundle_jobs(folder: Path, args: argparse.Namespace) -> tuple[str, Any, Any]:
    """Return a bundle's name, and its jobs for many sentences at once and for one at a time."""
    translator = Translator.load(folder)
    translator.defaults = replace(translator.defaults, beam_size=args.beam)
    if args.max_length:
        translator.defaults = replace(translator.defaults, max_len_a=0, max_len_b=args.max_length)
    dtype = json.loads((folder / "config.json").read_text())["dtype"]

    def many(sources: list[str]) -> list[str]:
        return [one.text for one in translator.translate(sources)]

    return (
        f"nmt_moe, {dtype}",
        many,
        lambda sources: [text for source in sources for text in many([source])],
    )


def ctranslate2_jobs(name: str, args: argparse.Namespace) -> tuple[str, Any, Any]:
    """Return the name and the two jobs of FOLDER[:TYPE], a model converted by CTranslate2."""
    import ctranslate2

    folder, _, compute_type = name.partition(":")
    translator = ctranslate2.Translator(
        folder,
        intra_threads=args.threads,
        inter_threads=1,
        compute_type=compute_type or "float32",
    )
    processor = SentencePieceProcessor(model_file=str(args.pieces))

    def many(sources: list[str]) -> list[str]:
        results = translator.translate_batch(
            processor.encode(sources, out_type=str),
            beam_size=args.beam,
            max_batch_size=1024,
            batch_type="tokens",
        )
        return [processor.decode(result.hypotheses[0]) for result in results]

    return (
        f"CTranslate2, {compute_type or 'float32'}",
        many,
        lambda sources: [text for source in sources for text in many([source])],
    )


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each competitor and each way of translating, in batches or one at a time."""
    interactive = InteractiveCommand(args) if args.interactive else None
    fairseq = FairseqTranslator(args)
    sources, first = fairseq.sources, fairseq.sources[: args.one]
    work: dict[tuple[str, str], Callable[[], list[str]]] = {
        (FAIRSEQ, "batch"): fairseq.job(len(sources), args.batch),
        (FAIRSEQ, "one"): fairseq.job(len(first), 1),
    }
    clocks: dict[str, Callable[[], float]] = {}
    if interactive is not None:
        work[INTERACTIVE, "one"] = lambda: interactive.translate(first)
        clocks[INTERACTIVE] = interactive.cpu_seconds
    others = [bundle_jobs(folder, args) for folder in args.bundles]
    others += [ctranslate2_jobs(name, args) for name in args.ctranslate2]
    for name, many, one_by_one in others:
        work[name, "batch"] = lambda many=many: many(sources)
        work[name, "one"] = lambda one_by_one=one_by_one: one_by_one(first)
    texts: dict[str, list[str]] = {}

    def job(key: tuple[str, str], run: Callable[[], list[str]]) -> timing.Job:
        clock = clocks.get(key[0], time.process_time)

        def timed() -> Mapping[str, float]:
            start = clock()
            texts[", ".join(key)] = run()
            return {"cpu": clock() - start}

        return timed

    jobs = {", ".join(key): job(key, run) for key, run in work.items()}
    samples = timing.interleave(jobs, args.rounds)
    if interactive is not None:
        interactive.close()
    rows = []
    for name, way in work:
        key = f"{name}, {way}"
        count = len(texts[key])
        found, base = samples[key], samples[f"{FAIRSEQ}, {way}"]
        rows.append(
            {
                "translator": name,
                "way": way,
                "sentences": count,
                "seconds": found.seconds,
                "cpu": found.parts["cpu"],
                "ms": found.median / count * 1e3,
                "cpu_ms": found.part("cpu") / count * 1e3,
                "speed_up": base.median / found.median,
                "cpu_speed_up": base.part("cpu") / found.part("cpu"),
                "bleu": sacrebleu.corpus_bleu(texts[key], [fairseq.references[:count]]).score,
                "same": statistics.mean(
                    one == other
                    for one, other in zip(texts[key], texts[f"{FAIRSEQ}, {way}"], strict=True)
                ),
            }
        )
    return rows


def measure_loading(folders: list[Path], rounds: int) -> list[str]:
    """Measure how long new processes take to load each bundle, and return a line for each.

    A bundle is warm if its files are still in memory, and cold after the system has been told to
    drop them.
    """
    lines = []
    for folder in folders:
        load_bundle(folder)
        warm = [load_bundle(folder) for _ in range(rounds)]
        cold = []
        for _ in range(rounds):
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cold.append(load_bundle(folder))
        whole, own = (statistics.median(times) for times in zip(*warm, strict=True))
        _, cold_own = (statistics.median(times) for times in zip(*cold, strict=True))
        lines.append(
            f"{folder.name}: loaded in {whole:.2f} s, including torch's import; without it, in "
            f"{own:.2f} s, or in {cold_own:.2f} s if its files are not in memory."
        )
    return lines


def load_bundle(folder: Path) -> tuple[float, float]:
    """Return how long a new process takes to open a bundle, with and without importing torch."""
    # The path must not be relative, because the process has another working directory.
    line = [sys.executable, "-c", LOAD, str(folder.resolve())]
    found = subprocess.run(line, check=True, capture_output=True, text=True, cwd=timing.REPOSITORY)
    whole, own = json.loads(found.stdout)
    return whole, own


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Lay out the table; speed-ups are relative to fairseq's generator."""
    lines = [
        [
            row["translator"],
            f"{row['sentences']} {'at once' if row['way'] == 'batch' else 'one at a time'}",
            f"{row['ms']:.1f}",
            f"{row['speed_up']:.2f}",
            f"{row['cpu_ms']:.1f}",
            f"{row['cpu_speed_up']:.2f}",
            f"{row['bleu']:.1f}",
        ]
        for row in sorted(rows, key=lambda row: row["way"])
    ]
    return timing.markdown_table(COLUMNS, lines)


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="output of fairseq-preprocess")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint for fairseq")
    parser.add_argument(
        "--pieces", type=Path, help="sentencepiece model; without it, tokens are words"
    )
    parser.add_argument("--bundles", type=Path, nargs="*", default=[], help="bundles of the model")
    parser.add_argument(
        "--ctranslate2", nargs="*", default=[], metavar="FOLDER[:TYPE]", help="converted models"
    )
    parser.add_argument("--interactive", action="store_true", help="also time fairseq-interactive")
    parser.add_argument("--sentences", type=int, default=1000, help="sentences to translate (1000)")
    parser.add_argument(
        "--one", type=int, default=50, help="sentences to translate one at a time (50)"
    )
    parser.add_argument("--batch", type=int, default=64, help="sentences per fairseq batch (64)")
    parser.add_argument("--beam", type=int, default=5, help="beam size (5)")
    parser.add_argument(
        "--max-length",
        type=int,
        default=0,
        help="maximum number of pieces per translation, for models with random weights",
    )
    timing.add_common_flags(parser)
    args = parser.parse_args(argv)
    timing.prepare(args)
    rows = measure(args)
    hardware = timing.describe_hardware("cpu", args.threads)
    timing.write_json(args.json, args, hardware, rows)
    print(format_rows(rows))
    print(f"\n{hardware}; beam {args.beam}; medians of {args.rounds} interleaved rounds.")
    print("Speed-ups are relative to fairseq's generator translating in the same way.")
    for row in rows:
        if row["translator"].startswith("nmt_moe, float32"):
            print(f"Float32, {row['way']}: {row['same']:.1%} of the translations equal fairseq's.")
    for line in measure_loading(args.bundles, args.rounds):
        print(line)


if __name__ == "__main__":
    main()
