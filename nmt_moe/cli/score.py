"""`nmt-moe score`: score a translation."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.cli._paths import FILE
from nmt_moe.scoring import measures as lib


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
@click.option(
    "--src", type=FILE, help="Source text, to add scores by source length and to count copies."
)
@click.option("--against", type=FILE, help="A second translation, compared by paired bootstrap.")
@click.option(
    "--samples", type=click.IntRange(1), default=1000, help="Number of bootstrap resamples (1000)."
)
@click.option(
    "--lang", help="Language of the texts (default: the extension of the first reference)."
)
@click.option("--tokenize", help="sacrebleu tokeniser to use instead of the language's.")
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
    """Score a translation against one or more references; print each score with its signature.

    The texts must be detokenised, with one sentence per line. sacrebleu computes all scores.

    \b
    multi-bleu        both texts tokenised as in Moses (with sacremoses), cased, not
                      smoothed: the score of Moses' multi-bleu.perl, which the papers
                      on GNMT and on mixture-of-experts translation report
    multi-bleu-lowercase
                      multi-bleu with all letters in lower case
                      (multi-bleu.perl -lc converts only ASCII letters)
    multi-bleu-compound-split
                      multi-bleu with hyphenated compounds split after tokenising, a
                      later convention. Scores are higher; never compare them with
                      scores in earlier papers
    sacrebleu-13a, -intl
                      sacrebleu's own tokenisers, cased: the scores to publish; zh for
                      Chinese, ja-mecab for Japanese, ko-mecab for Korean
    chrf, ter         character n-grams (chrF2); edits per 100 words (lower is better)

    With --tokenized, multi-bleu uses the texts as they are, and the scores that need plain text
    are not computed.
    """  # noqa: D301 - \b keeps the table as it is
    if tokenize and tokenized:
        raise ValueError("`--tokenize` has no effect with `--tokenized`: leave one out.")
    further = [path for path in (src, against) if path is not None]
    hypotheses, *texts = lib.read_texts([hypothesis, *references, *further])
    measures = lib.make_measures(lib.choose_language(lang, references[0], tokenized), tokenize)
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
    """Return a report as readable text."""
    lines = []
    for row in report["scores"]:
        lines.append(f"{row['name']:<26} {row['score']:6.2f}  {row['details']}".rstrip())
        lines.append(f"{'':<26}         {row['signature']}")
    if "source" in report:
        source = report["source"]
        lines.append(f"\n{source['measure']} by number of source words")
        for row in source["rows"]:
            lines.append(f"{row['words']:>8} {row['score']:6.2f}  {row['sentences']} sentences")
        lines.append(f"translations that copy their source: {source['copies']}")
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
