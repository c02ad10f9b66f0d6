"""`nmt-moe translate`: translate raw text with an exported model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from nmt_moe.checks import check_whole
from nmt_moe.cli._command import command, set_threads, standard_input
from nmt_moe.cli._paths import BUNDLE, FILE_OR_INPUT, NEW_FILE
from nmt_moe.text.lines import BadLine, open_bytes, open_output

if TYPE_CHECKING:
    from nmt_moe.inference import Translation

STANDARD_INPUT = Path("-")


@command(
    "translate",
    """
nmt-moe translate en-de < text.en > text.de
nmt-moe translate en-de text.en more.en --output text.de
echo 'A dog runs.' | nmt-moe translate en-de --nbest 3 --beam 8
nmt-moe translate many --target-lang fr --jsonl --experts < text.en > text.jsonl
nmt-moe translate en-de --ensemble en-de-seed2 < text.en
""",
)
@click.argument("folder", type=BUNDLE)
@click.argument("files", type=FILE_OR_INPUT, nargs=-1)
@click.option(
    "--output",
    type=NEW_FILE,
    help="File to write once everything is translated.  [default: standard output, line by line]",
)
@click.option("--target-lang", help="Language to translate into, for a multilingual model.")
@click.option(
    "--ensemble",
    type=BUNDLE,
    multiple=True,
    help="Another bundle to average predictions with; repeatable.",
)
@click.option(
    "--beam", type=int, help="Number of hypotheses kept at each step.  [default: the bundle's]"
)
@click.option(
    "--nbest", type=int, help="Print the N best translations: line number, tab, score, tab, text."
)
@click.option("--length-penalty-alpha", type=float, help="GNMT's length penalty; 0: off.")
@click.option("--coverage-penalty-beta", type=float, help="GNMT's coverage penalty; 0: off.")
@click.option("--beam-prune", type=float, help="GNMT's pruning, in nats; 0: off.")
@click.option("--batch-tokens", type=int, help="Number of source pieces to translate at once.")
@click.option(
    "--jsonl",
    is_flag=True,
    help="Print a JSON object for each line: text, scores, pieces, alignment.",
)
@click.option(
    "--experts", is_flag=True, help="With --jsonl: add the experts and gates of each piece."
)
@click.option("--threads", type=int, help="Number of CPU threads to use.  [default: torch's]")
@click.option(
    "--progress/--no-progress",
    default=None,
    help="Show a progress bar on standard error.  [default: only for files, if it is a terminal]",
)
def translate(
    folder: Path,
    files: tuple[Path, ...],
    output: Path | None,
    target_lang: str | None,
    ensemble: tuple[Path, ...],
    beam: int | None,
    nbest: int | None,
    jsonl: bool,
    experts: bool,
    threads: int | None,
    progress: bool | None,
    **options: float | None,
) -> None:
    """Translate FILES, or standard input, with the bundle FOLDER, line by line.

    A file named - stands for standard input. Blank lines stay blank. A line that is not text
    (invalid UTF-8, control characters) is left blank and reported at the end. The exit status is
    then 1, but all other lines are translated.
    """
    if experts and not jsonl:
        raise ValueError("`--experts` needs `--jsonl`.")
    if nbest is not None:
        check_whole("--nbest", nbest, 1)
    set_threads(threads)
    from nmt_moe.inference.translator import Translator

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given |= {"num_hypotheses": nbest or 1, "with_experts": experts}
    if beam is not None:
        given["beam_size"] = beam
    translator = Translator.load([folder, *ensemble])
    write = _jsonl if jsonl else _text if nbest is None else _nbest
    sources = [None if file == STANDARD_INPUT else file for file in files or (STANDARD_INPUT,)]
    is_shown = progress if progress is not None else None not in sources and sys.stderr.isatty()
    with open_output(output) as stream:
        faults = _translate(translator, sources, stream, write, target_lang, is_shown, given)
    if faults:
        raise ValueError(f"{' '.join(faults)} All other lines were translated.")


Write = Callable[[int, "Translation | None"], str]


def _translate(
    translator: Any,
    sources: list[Path | None],
    file: TextIO,
    write: Write,
    target_lang: str | None,
    is_shown: bool,
    options: dict[str, Any],
) -> list[str]:
    """Translate files and, for None, standard input; return messages that name the bad lines."""
    from nmt_moe.inference.files import count_ends, describe_faults, scan_stream, show_progress

    faults, number = [], 0
    for source in sources:
        bad: list[BadLine] = []
        with ExitStack() as stack:
            stream = standard_input() if source is None else stack.enter_context(open_bytes(source))
            name = "standard input" if source is None else str(source)
            lines, read_ahead = scan_stream(stream, name)
            total = None if source is None else count_ends(source)
            shown = show_progress(lines, total, is_shown)
            results = translator.translate_lines(
                shown, target_lang, read_ahead=read_ahead, **options
            )
            for result in results:
                number += 1
                if isinstance(result, BadLine):
                    bad.append(result)
                file.write(write(number, None if isinstance(result, BadLine) else result))
                if read_ahead == 1:
                    file.flush()
        if bad:
            faults.append(f"{name}: {describe_faults(bad)}")
    return faults


def _text(number: int, result: Translation | None) -> str:
    return ("" if result is None else result.text) + "\n"


def _nbest(number: int, result: Translation | None) -> str:
    if result is None:
        return f"{number}\t\t\n"
    scores = [result.score]
    if len(result.sentences) == 1:
        scores = [one.score for one in result.sentences[0].hypotheses]
    elif result.sentences:
        ranks = range(len(result.hypotheses))
        scores = [sum(s.hypotheses[rank].score for s in result.sentences) for rank in ranks]
    pairs = zip(scores, result.hypotheses, strict=True)
    return "".join(f"{number}\t{score:.4f}\t{text}\n" for score, text in pairs)


def _jsonl(number: int, result: Translation | None) -> str:
    content = {"line": number, **({"text": None} if result is None else result.to_dict())}
    return json.dumps(content, ensure_ascii=False) + "\n"
