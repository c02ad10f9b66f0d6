#!/usr/bin/env python3
"""Score a translation: BLEU as each convention counts it, chrF and TER, each with its signature.

    score.py translation.de newstest2014.de --src newstest2014.en
    score.py translation.de newstest2014.de --against other_translation.de

Texts are one sentence a line, detokenised; all figures come from sacrebleu.

  multi-bleu                 both texts tokenised as Moses does (here by sacremoses), cased, without
                             smoothing: the figure of Moses' multi-bleu.perl, with which the papers
                             on GNMT and on mixture-of-experts translation compare
  multi-bleu-lowercase       the same in lower case. All letters are lowered; multi-bleu.perl -lc
                             lowers ASCII letters alone
  multi-bleu-compound-split  hyphenated compounds taken apart after tokenising: a habit of the
                             Transformer's time. It is higher; never compare it with earlier papers
  sacrebleu-13a, -intl       sacrebleu's own tokens, cased: the figures to publish
  chrf, ter                  character n-grams (chrF2); edits for 100 words (less is better)

With --tokenized the texts are tokenised already: multi-bleu takes them as they are, and the figures
that need plain text are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sacremoses
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from tools.check_parallel import check_parallel, read_lines
from tools.printing import run

# Spaces to Python, letters to multi-bleu.perl, which reads bytes: a non-breaking space for one.
WIDE_SPACE = re.compile(r"[^\S \t\n\r\f\v]")
# Source lengths in words at which a row of --src ends.
LENGTH_ENDS = (10, 20, 30, 40, 50)


@dataclass(frozen=True)
class Measure:
    """One figure: how both texts are brought into form, and sacrebleu's metric for that form.

    note: what the metric's signature does not know.
    """

    name: str
    prepare: Callable[[str], str]
    make_metric: Callable[[], Metric]
    note: str = ""

    def describe(self, metric: Metric) -> str:
        return "|".join([f"{metric.get_signature()}", *filter(None, [self.note])])


def keep(line: str) -> str:
    return line


def split_compounds(line: str) -> str:
    """Take hyphenated compounds of a tokenised line apart.

    From left to right without overlap, so that the second hyphen of a-b-c stays, as in the Perl
    one-liner that everybody used.
    """
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line)


def make_tokenizer(language: str | None) -> tuple[Callable[[str], str], str]:
    """Return the function that tokenises a line, and its name for signatures.

    language: of the texts; None if they are tokenised already.
    """
    if language is None:
        return _keep_words, "as given"
    moses = sacremoses.MosesTokenizer(lang=language)

    def tokenize(line: str) -> str:
        return _keep_words(moses.tokenize(line, return_str=True))

    return tokenize, f"moses-{language}, sacremoses {sacremoses.__version__}"


def _keep_words(line: str) -> str:
    return WIDE_SPACE.sub(lambda found: chr(0xF0000 + ord(found[0])), line)


def make_measures(language: str | None) -> list[Measure]:
    """List the figures for texts in `language` (None: tokenised already, multi-bleu alone)."""
    tokenize, name = make_tokenizer(language)
    note = f"words:{name}"

    def multi_bleu(lowercase: bool = False) -> Metric:
        # force: sacrebleu warns of tokenised text, which is what this figure is about.
        return BLEU(tokenize="none", smooth_method="none", lowercase=lowercase, force=True)

    measures = [
        Measure("multi-bleu", tokenize, multi_bleu, note),
        Measure("multi-bleu-lowercase", tokenize, lambda: multi_bleu(lowercase=True), note),
        Measure(
            "multi-bleu-compound-split",
            lambda line: split_compounds(tokenize(line)),
            multi_bleu,
            note + "|compounds:split, not comparable with GNMT's and the MoE paper's",
        ),
    ]
    if language is not None:
        measures += [
            Measure("sacrebleu-13a", keep, lambda: BLEU(tokenize="13a")),
            Measure("sacrebleu-intl", keep, lambda: BLEU(tokenize="intl")),
            Measure("chrf", keep, CHRF),
            Measure("ter", keep, TER),
        ]
    return measures


def score(measure: Measure, hypotheses: list[str], references: list[str]) -> dict:
    """Return a measure's name, its score in percent, details and signature.

    details: for BLEU the precisions, brevity penalty and lengths in words.
    """
    metric = measure.make_metric()
    result = metric.corpus_score(
        [measure.prepare(line) for line in hypotheses],
        [[measure.prepare(line) for line in references]],
    )
    return {
        "name": measure.name,
        "score": float(result.score),
        "details": getattr(result, "_verbose", ""),
        "signature": measure.describe(metric),
    }


def compare(
    measure: Measure,
    hypotheses: list[str],
    others: list[str],
    references: list[str],
    num_samples: int,
) -> dict:
    """Test by paired bootstrap (Koehn 2004, sacrebleu's) whether two translations differ.

    Returns:
        Both scores, each with the mean and the half width of its 95% interval over the resamples,
        and p: how probable a difference of this size is between equally good translations.
    """
    systems = [
        (name, [measure.prepare(line) for line in lines])
        for name, lines in (("other", others), ("this", hypotheses))
    ]
    prepared = [[measure.prepare(line) for line in references]]
    test = PairedTest(
        systems, {"metric": measure.make_metric()}, prepared, test_type="bs", n_samples=num_samples
    )
    signatures, scores = test()
    (key,) = signatures
    other, this = scores[key]
    # sacrebleu counts resamples that exceed the difference, and finds none if all are equal.
    is_same = systems[0][1] == systems[1][1]
    # float(): JSON does not take numpy's numbers.
    return {
        "name": measure.name,
        "score": float(this.score),
        "mean": float(this.mean),
        "interval": float(this.ci),
        "other_score": float(other.score),
        "other_mean": float(other.mean),
        "other_interval": float(other.ci),
        "p": 1.0 if is_same else float(this.p_value),
        "signature": "|".join([f"{signatures[key]}", *filter(None, [measure.note])]),
    }


def score_by_source(
    measure: Measure, hypotheses: list[str], references: list[str], sources: list[str]
) -> dict:
    """Score by the length of the source in words, and count translations that repeat it."""
    rows = []
    start = 1
    for end in (*LENGTH_ENDS, None):
        chosen = [
            i
            for i, line in enumerate(sources)
            if max(len(line.split()), 1) >= start and (end is None or len(line.split()) <= end)
        ]
        if chosen:
            result = score(
                measure, [hypotheses[i] for i in chosen], [references[i] for i in chosen]
            )
            words = f"{start}-{end}" if end else f"{start}-"
            rows.append({"words": words, "sentences": len(chosen), "score": result["score"]})
        start = (end or 0) + 1
    copies = sum(hyp.strip() == src.strip() for hyp, src in zip(hypotheses, sources, strict=True))
    return {"measure": measure.name, "rows": rows, "copies": copies}


def read_texts(paths: Iterable[Path]) -> list[list[str]]:
    """Read files of equally many lines; an empty translation is allowed.

    Raises:
        ValueError: a file is missing, has no lines, is not UTF-8, or has another length.
    """
    paths = list(paths)
    check_parallel(paths, allow_empty=True)
    texts = [[line.decode("utf-8").rstrip("\r") for line in read_lines(path)] for path in paths]
    for path, text in zip(paths, texts, strict=True):
        if not any(line.strip() for line in text):
            raise ValueError(f"{path}: all {len(text)} lines are empty, there is nothing to score")
    return texts


def choose_language(name: str | None, reference: Path, tokenized: bool) -> str | None:
    """Return the language of the tokeniser: --lang, or what the reference's name ends in.

    Raises:
        ValueError: neither tells.
    """
    if tokenized:
        if name is not None:
            raise ValueError(f"--lang {name} is of no use with --tokenized: leave one of them out")
        return None
    name = name or reference.name.removesuffix(".gz").rpartition(".")[2]
    if not re.fullmatch(r"[a-z]{2}", name):
        raise ValueError(
            f"--lang must be a language of two letters, but is '{name}' (taken from the name of "
            "the reference when it is not given). Give --lang de, for example."
        )
    return name


def print_text(report: dict) -> None:
    for row in report["scores"]:
        print(f"{row['name']:<26} {row['score']:6.2f}  {row['details']}".rstrip())
        print(f"{'':<26}         {row['signature']}")
    if "source" in report:
        source = report["source"]
        print(f"\n{source['measure']} by words of the source")
        for row in source["rows"]:
            print(f"{row['words']:>8} {row['score']:6.2f}  {row['sentences']} sentences")
        print(f"{source['copies']} translations repeat their source")
    if "bootstrap" in report:
        print(f"\npaired bootstrap against {report['against']}, {report['samples']} resamples")
        for row in report["bootstrap"]:
            print(
                f"{row['name']:<26} {row['score']:6.2f} ({row['mean']:.2f} +- "
                f"{row['interval']:.2f}) against {row['other_score']:.2f} "
                f"({row['other_mean']:.2f} +- {row['other_interval']:.2f}), p = {row['p']:.4f}"
            )
            print(f"{'':<26}         {row['signature']}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hypothesis", type=Path, help="the translation, one sentence a line")
    parser.add_argument("reference", type=Path, help="the right translation of the same sentences")
    parser.add_argument(
        "--src", type=Path, help="the source: scores by its length, and translations equal to it"
    )
    parser.add_argument("--against", type=Path, help="a second translation: paired bootstrap")
    parser.add_argument(
        "--samples", type=int, default=1000, help="resamples of the bootstrap (default: 1000)"
    )
    parser.add_argument(
        "--lang", help="language of the tokeniser (default: the ending of the reference's name)"
    )
    parser.add_argument("--tokenized", action="store_true", help="the texts are tokenised already")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def make_report(arguments: argparse.Namespace) -> dict:
    """Read, check and score all that the arguments ask for."""
    if arguments.samples < 1:
        raise ValueError(f"--samples must be at least 1, but is {arguments.samples}")
    language = choose_language(arguments.lang, arguments.reference, arguments.tokenized)
    further = [path for path in (arguments.src, arguments.against) if path is not None]
    texts = read_texts([arguments.hypothesis, arguments.reference, *further])
    hypotheses, references = texts[:2]
    measures = make_measures(language)
    report: dict = {
        "hypothesis": str(arguments.hypothesis),
        "reference": str(arguments.reference),
        "sentences": len(references),
        "scores": [score(measure, hypotheses, references) for measure in measures],
    }
    if arguments.src is not None:
        report["source"] = score_by_source(measures[0], hypotheses, references, texts[2])
    if arguments.against is not None:
        report["against"] = str(arguments.against)
        report["samples"] = arguments.samples
        report["bootstrap"] = [
            compare(measure, hypotheses, texts[-1], references, arguments.samples)
            for measure in measures
        ]
    return report


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        report = make_report(arguments)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if arguments.json:
        json.dump(report, sys.stdout, indent=1)
        print()
    else:
        print_text(report)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
