"""`nmt-moe score`: figures of a translation."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.scoring import measures as lib

FILE = click.Path(path_type=Path)


@command(
    "score",
    """
nmt-moe score translation.de newstest2014.de --src newstest2014.en
nmt-moe score translation.de newstest2014.de --against other_translation.de
nmt-moe score translation.zh reference1.zh reference2.zh --json
""",
)
@click.argument("hypothesis", type=FILE)
@click.argument("references", nargs=-1, required=True, type=FILE)
@click.option("--src", type=FILE, help="The source: scores by its length, and copies of it.")
@click.option("--against", type=FILE, help="A second translation: paired bootstrap.")
@click.option(
    "--samples", type=click.IntRange(1), default=1000, help="Resamples of the bootstrap (1000)."
)
@click.option("--lang", help="Language of the texts (the ending of the first reference's name).")
@click.option("--tokenize", help="Tokeniser of sacrebleu instead of the language's.")
@click.option("--tokenized", is_flag=True, help="The texts are tokenised already.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def score(
    hypothesis: Path,
    references: tuple[Path, ...],
    src: Path | None,
    against: Path | None,
    samples: int,
    lang: str | None,
    tokenize: str | None,
    tokenized: bool,
    as_json: bool,
) -> None:
    """Score a translation with one or several references; every figure has its signature.

    Texts are one sentence a line, detokenised; all figures come from sacrebleu.

    \b
    multi-bleu        both texts tokenised as Moses does (by sacremoses), cased, not
                      smoothed: the figure of Moses' multi-bleu.perl, with which the
                      papers on GNMT and on mixture-of-experts translation compare
    multi-bleu-lowercase
                      the same in lower case: of all letters (multi-bleu.perl -lc
                      lowers those of ASCII only)
    multi-bleu-compound-split
                      hyphenated compounds taken apart after tokenising, a later
                      habit. It is higher; never compare it with earlier papers
    sacrebleu-13a, -intl
                      sacrebleu's own tokens, cased: the figures to publish; for
                      Chinese zh, for Japanese ja-mecab, for Korean ko-mecab
    chrf, ter         character n-grams (chrF2); edits for 100 words (less is better)

    With --tokenized the texts are tokenised already: multi-bleu takes them as they are, and the
    figures that need plain text are left out.
    """  # noqa: D301 - \b keeps the table as it is
    if tokenize and tokenized:
        raise ValueError("`--tokenize` has no effect with `--tokenized`: leave one out.")
    measures = lib.make_measures(lib.choose_language(lang, references[0], tokenized), tokenize)
    further = [path for path in (src, against) if path is not None]
    hypotheses, *texts = lib.read_texts([hypothesis, *references, *further])
    references_read = texts[: len(references)]
    report: dict = {
        "hypothesis": str(hypothesis),
        "references": [str(path) for path in references],
        "sentences": len(hypotheses),
        "scores": [lib.score(measure, hypotheses, references_read) for measure in measures],
    }
    if src is not None:
        sources = texts[len(references)]
        report["source"] = lib.score_by_source(measures[0], hypotheses, references_read, sources)
    if against is not None:
        report["against"] = str(against)
        report["samples"] = samples
        report["bootstrap"] = [
            lib.compare(measure, hypotheses, texts[-1], references_read, samples)
            for measure in measures
        ]
    click.echo(json.dumps(report, indent=1) if as_json else format_report(report))


def format_report(report: dict) -> str:
    """Lay a report out for people."""
    lines = []
    for row in report["scores"]:
        lines.append(f"{row['name']:<26} {row['score']:6.2f}  {row['details']}".rstrip())
        lines.append(f"{'':<26}         {row['signature']}")
    if "source" in report:
        source = report["source"]
        lines.append(f"\n{source['measure']} by words of the source")
        for row in source["rows"]:
            lines.append(f"{row['words']:>8} {row['score']:6.2f}  {row['sentences']} sentences")
        lines.append(f"{source['copies']} translations repeat their source")
    if "bootstrap" in report:
        lines.append(
            f"\npaired bootstrap against {report['against']}, {report['samples']} resamples"
        )
        for row in report["bootstrap"]:
            lines.append(
                f"{row['name']:<26} {row['score']:6.2f} ({row['mean']:.2f} +- "
                f"{row['interval']:.2f}) against {row['other_score']:.2f} "
                f"({row['other_mean']:.2f} +- {row['other_interval']:.2f}), p = {row['p']:.4f}"
            )
            lines.append(f"{'':<26}         {row['signature']}")
    return "\n".join(lines)
