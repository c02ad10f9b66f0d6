"""`nmt-moe report`: write a page on a model's experts and on how well the model translates."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmt_moe.cli._command import command, list_option, set_threads
from nmt_moe.cli._paths import BUNDLE, FILE, NEW_FILE
from nmt_moe.text.lines import open_output
from nmt_moe.text.outputs import check_outputs

if TYPE_CHECKING:
    from nmt_moe.inspection import Part


@command(
    "report",
    """
nmt-moe report en-de --text test.en --reference test.de --output report.html
nmt-moe report en-de --text test.en --reference test.de --against en-de-int8 --output report.html
nmt-moe report many --text test.en --reference test.de test.fr --target-lang de fr \\
    --output report.html --json report.json
nmt-moe report my-language-model --text test.txt --output report.html
""",
)
@click.argument("folder", type=BUNDLE)
@list_option(
    "--text", type=FILE, required=True, help="Text to read: one file, or one for each part."
)
@list_option("--reference", type=FILE, help="Translations of the text, one file for each part.")
@list_option("--target-lang", help="For a multilingual model: target languages, one for each part.")
@click.option("--against", type=BUNDLE, help="A second bundle to compare with.")
@click.option("--output", type=NEW_FILE, help="HTML page to write (always smaller than 5 MB).")
@click.option(
    "--json",
    "dump",
    type=NEW_FILE,
    help="JSON file to write, with the values on the page and additional ones.",
)
@click.option("--threads", type=int, help="Number of CPU threads to use.  [default: torch's]")
@click.option(
    "--progress/--no-progress",
    default=None,
    help="Show progress bars on standard error.  [default: only if it is a terminal]",
)
def report(
    folder: Path,
    text: tuple[Path, ...],
    reference: tuple[Path, ...],
    target_lang: tuple[str, ...],
    against: Path | None,
    output: Path | None,
    dump: Path | None,
    threads: int | None,
    progress: bool | None,
) -> None:
    """Report how the bundle FOLDER uses its experts on a text, and how well it translates.

    The page shows the load of the experts in every layer; for each expert, the contexts with the
    largest gates (Table 9 of Shazeer et al. 2017) and the pieces for which it is over-used;
    sentences with their attention and the experts used for each piece; and, with a reference, BLEU
    and chrF. It needs neither network access nor scripts.

    For several languages, the report is divided into parts: give a --target-lang and a --reference
    for each part, and either one --text for all parts or one for each. Blank lines are skipped.
    """
    outputs = [path for path in (output, dump) if path is not None]
    if not outputs:
        raise ValueError("name a file to write: `--output report.html` or `--json report.json`.")
    bundles = [one for one in (folder, against) if one is not None]
    check_outputs(
        [*text, *reference, *(file for one in bundles for file in one.glob("*"))], outputs
    )
    set_threads(threads)
    from nmt_moe.inspection import make_report, render_page

    parts = read_parts(text, reference, target_lang)
    is_shown = sys.stderr.isatty() if progress is None else progress
    values = make_report(folder, parts, against, is_shown)
    page = render_page(values) if output is not None else ""
    if dump is not None:
        with open_output(dump) as file:
            json.dump(values, file, ensure_ascii=False, allow_nan=False)
            file.write("\n")
    if output is not None:
        with open_output(output) as file:
            file.write(page)
    for path in outputs:
        click.echo(f"{path}: written", err=True)


def read_parts(
    texts: Sequence[Path], references: Sequence[Path], languages: Sequence[str]
) -> list[Part]:
    """Read the files of each part.

    Raises:
        ValueError: if the numbers of files or languages do not match, or a file is rejected.
    """
    from nmt_moe.inspection import Part
    from nmt_moe.scoring.measures import read_texts

    num_parts = max(len(texts), len(references), len(languages))
    for name, given, may_be in (
        ("--text", texts, (1, num_parts)),
        ("--reference", references, (0, num_parts)),
        ("--target-lang", languages, (0, 1, num_parts)),
    ):
        if len(given) not in may_be:
            raise ValueError(
                f"`{name}` takes {' or '.join(map(str, sorted(set(may_be))))} values for "
                f"{num_parts} parts, but was given {len(given)}."
            )
    all_texts = list(texts) * (num_parts // len(texts))
    all_languages = list(languages) * (num_parts // len(languages)) if languages else []
    parts, names = [], set()
    for number, text in enumerate(all_texts):
        files = [text, *references[number : number + 1]]
        lines = read_texts(files)
        language = all_languages[number] if all_languages else None
        name = language if len(set(all_languages)) == num_parts and language else text.name
        if name in names:
            name = f"{name} ({number + 1})"
        names.add(name)
        ending = files[1].name.removesuffix(".gz").rpartition(".")[2] if references else None
        reference = lines[1] if references else None
        parts.append(Part(name, lines[0], reference, language, ending))
    return parts
