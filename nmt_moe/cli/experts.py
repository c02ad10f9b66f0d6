"""`nmt-moe experts`: measure how experts are used on a text, or change their number."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmt_moe.cli._command import Group, command, list_option
from nmt_moe.cli._paths import BUNDLE, FILE, NEW_PATH, Existing
from nmt_moe.cli.report import read_parts

if TYPE_CHECKING:
    from nmt_moe.inspection import Part
    from nmt_moe.resizing import Layer, Survey

MODEL = Existing(
    "file", "bundle", advice="Name a checkpoint, or a folder that `nmt-moe export` wrote."
)


@click.group(
    "experts",
    cls=Group,
    examples="""
nmt-moe experts stats en-de --text dev.en --reference dev.de
nmt-moe experts prune en-de --num-experts 8 --text dev.en --reference dev.de --output en-de-8
nmt-moe experts merge en-de --num-experts 8 --text dev.en --reference dev.de --output en-de-8
nmt-moe experts upcycle dense.pt --num-experts 16 --top-k 2 --output moe.pt
""",
)
def experts() -> None:
    """Examine the experts of a trained model, or write a copy with fewer or more experts.

    MODEL is a bundle or a checkpoint; it is not changed. To read text, a checkpoint needs the
    bundle that was exported from it.
    """


def _text_options(is_needed: bool) -> Callable[[Callable], Callable]:
    """Decorate a command with the options that name texts, as in `nmt-moe report`."""

    def decorate(function: Callable) -> Callable:
        for option in (
            list_option(
                "--target-lang", help="For a multilingual model: target language of each text."
            ),
            list_option("--reference", type=FILE, help="Translations, one file for each text."),
            list_option("--text", type=FILE, required=is_needed, help="Text to read."),
        ):
            function = option(function)
        return function

    return decorate


def _output_options(function: Callable) -> Callable:
    """Decorate a command with the options for its output."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option(
            "--bundle",
            type=BUNDLE,
            help="For a checkpoint: bundle with its vocabulary and pieces.",
        ),
        click.option(
            "--output", type=NEW_PATH, required=True, help="Bundle or checkpoint to write."
        ),
    ):
        function = option(function)
    return function


def _choice_options(function: Callable) -> Callable:
    """Decorate a command with the options that decide which experts are kept."""
    for option in (
        click.option(
            "--equal-texts",
            is_flag=True,
            help="Weight texts (of several languages) equally, regardless of their length.",
        ),
        click.option(
            "--scope",
            type=click.Choice(["layer", "model"]),
            default="layer",
            show_default=True,
            help="layer: keep --num-experts in each layer; model: keep that many on average.",
        ),
        click.option(
            "--by",
            type=click.Choice(["contribution", "importance", "load"]),
            default="contribution",
            show_default=True,
            help="Rank experts by gate times output norm, by gates, or by number of tokens.",
        ),
        click.option(
            "--num-experts",
            type=int,
            required=True,
            help="Number of experts to keep in each layer.",
        ),
    ):
        function = option(function)
    return function


@command("stats", "nmt-moe experts stats en-de --text dev.en --reference dev.de")
@click.argument("folder", type=BUNDLE)
@_text_options(is_needed=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def stats(
    folder: Path,
    text: tuple[Path, ...],
    reference: tuple[Path, ...],
    target_lang: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print how the experts of the bundle FOLDER are used on a text.

    For each layer, the command prints the columns of the paper's Table 6 and each expert's share of
    the tokens' choices (load), of the gates (importance) and of the output (contribution: gate
    times norm of the expert's output).
    """
    from nmt_moe.resizing import shares

    surveys = _survey(folder, read_parts(text, reference, target_lang))
    columns = {by: shares(surveys, by) for by in ("load", "importance", "contribution")}
    content: dict[str, Any] = {}
    for side in surveys[0].layers:
        usage = surveys[0].layers[side].usage
        for other in surveys[1:]:
            usage += other.layers[side].usage
        rows = {by: columns[by][side].tolist() for by in columns}
        content[side] = {**usage.to_dict(), "shares": rows}
    if as_json:
        click.echo(json.dumps(content, indent=2))
        return
    for side, values in content.items():
        _print_layer(side, values)


def _print_layer(side: str, values: dict[str, Any]) -> None:
    click.echo(f"{side}: {values['num_tokens']} tokens, {len(values['load'])} experts")
    for name in (
        *("cv_importance", "cv_load", "max_load", "idle_experts", "effective_experts"),
        *("gate_entropy", "gate_margin"),
    ):
        click.echo(f"  {name:<18} {values[name]:.3f}".rstrip("0").rstrip("."))
    click.echo("  expert      tokens      load  importance  contribution")
    rows = list(zip(*values["shares"].values(), strict=True))
    for expert in sorted(range(len(rows)), key=lambda e: -rows[e][2]):
        load, importance, contribution = (f"{100 * share:.2f} %" for share in rows[expert])
        tokens = values["load"][expert]
        click.echo(f"  {expert:>6} {tokens:>11} {load:>9} {importance:>11} {contribution:>13}")


@command(
    "prune",
    """
nmt-moe experts prune en-de --num-experts 8 --text dev.en --reference dev.de --output en-de-8
nmt-moe experts prune best.pt --bundle en-de --num-experts 8 --text dev.en --output pruned.pt
nmt-moe experts prune many --num-experts 16 --scope model --output many-16 \\
    --text dev.en dev.fr --reference dev.fr dev.en --target-lang fr en
""",
)
@click.argument("model", type=MODEL)
@_choice_options
@_text_options(is_needed=True)
@_output_options
def prune(model: Path, **options: Any) -> None:
    """Write a copy of MODEL with only the experts that contribute most on a text.

    Tokens that chose a dropped expert are sent to the best of the remaining experts. The command
    prints the perplexity before and after for a language model, and for a translation model if
    references are given. To train a pruned checkpoint further, use
    `fairseq-train --finetune-from-model`.
    """
    _reduce(model, is_merged=False, **options)


@command(
    "merge",
    "nmt-moe experts merge en-de --num-experts 8 --text dev.en --reference dev.de --output en-de-8",
)
@click.argument("model", type=MODEL)
@_choice_options
@_text_options(is_needed=True)
@_output_options
def merge(model: Path, **options: Any) -> None:
    """Write a copy of MODEL with fewer experts, merged by averaging.

    This command works like `prune`, but averages each dropped expert into the kept expert with
    the most similar gate, after matching their hidden units. It needs scipy (`pip install
    'nmt-moe[experts]'`).
    """
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise ValueError(
            "merging needs scipy, which is not installed. Run `pip install 'nmt-moe[experts]'`."
        ) from None
    _reduce(model, is_merged=True, **options)


def _reduce(
    path: Path,
    is_merged: bool,
    num_experts: int,
    by: str,
    scope: str,
    equal_texts: bool,
    text: tuple[Path, ...],
    reference: tuple[Path, ...],
    target_lang: tuple[str, ...],
    output: Path,
    bundle: Path | None,
    overwrite: bool,
) -> None:
    """Prune or merge, and print the perplexity before and after."""
    from nmt_moe import resizing
    from nmt_moe.checkpoints.files import check_output
    from nmt_moe.resizing.comparing import find_reader

    check_output(output, overwrite)
    model = resizing.read_model(path)
    reader = find_reader(model, bundle)
    parts = read_parts(text, reference, target_lang)
    moe = {side: layer.moe for side, layer in model.layers.items()}
    uniform = {side: _uniform(one.num_experts) for side, one in moe.items()}
    resizing.choose_experts(uniform, moe, num_experts, scope)  # rejects bad options early
    surveys = _survey(reader.path, parts)
    shares = resizing.shares(surveys, by, equal_texts)
    kept = resizing.choose_experts(shares, moe, num_experts, scope)

    def change(layers: dict[str, Layer]) -> dict[str, Layer]:
        if is_merged:
            return {s: resizing.merge(one, kept[s], shares[s]) for s, one in layers.items()}
        return {s: one.take(kept[s]) for s, one in layers.items()}

    verb = "Merged" if is_merged else "Pruned"
    counts = ", ".join(f"{s}: {len(kept[s])} of {moe[s].num_experts}" for s in kept)
    note = f"{verb} by {by} on {', '.join(one.name for one in text)} ({counts} experts)."
    model.write(output, change(model.layers), note, overwrite)
    for side, numbers in kept.items():
        share = float(shares[side][numbers].sum())
        listed = ", ".join(map(str, numbers))
        count = f"{len(numbers)} of {moe[side].num_experts}"
        click.echo(f"{side}: kept {count}, {share:.1%} of the {by}")
        click.echo(f"  {listed}")
    _print_perplexity(model, reader, output, change(reader.layers), surveys, parts)
    click.echo(f"{output}: written")


def _uniform(num_experts: int) -> Any:
    import torch

    return torch.full((num_experts,), 1 / num_experts)


def _print_perplexity(
    model: Any,
    reader: Any,
    output: Path,
    layers: dict[str, Layer],
    surveys: list[Survey],
    parts: list[Part],
) -> None:
    from nmt_moe.inference import total_score
    from nmt_moe.resizing.comparing import changed_reader, measure_perplexity

    scores = [one.score for one in surveys if one.score is not None]
    if len(scores) < len(surveys):
        click.echo("perplexity: not measured, because it needs a `--reference`")
        return
    before = total_score(scores).perplexity_per_piece
    with changed_reader(model, reader, output, layers) as folder:
        after = measure_perplexity(folder, parts, progress=sys.stderr.isatty())
    change = after / before - 1
    click.echo(f"perplexity per piece: {before:.3f} before, {after:.3f} after ({change:+.2%})")


@command(
    "upcycle",
    """
nmt-moe experts upcycle dense.pt --num-experts 16 --top-k 2 --output moe.pt
fairseq-train data-bin --user-dir nmt_moe --arch lstm_moe_gnmt_small --num-experts 16 --top-k 2 \\
    --hidden-dim 1024 --finetune-from-model moe.pt ...
""",
)
@click.argument("model", type=MODEL)
@click.option("--num-experts", type=int, required=True, help="Number of experts in each layer.")
@click.option("--top-k", type=int, required=True, help="Number of experts for each token.")
@_text_options(is_needed=False)
@_output_options
def upcycle(
    model: Path,
    num_experts: int,
    top_k: int,
    text: tuple[Path, ...],
    reference: tuple[Path, ...],
    target_lang: tuple[str, ...],
    output: Path,
    bundle: Path | None,
    overwrite: bool,
) -> None:
    """Write a copy of the dense MODEL with several experts, each a copy of the model's only expert.

    At first, the new model's output equals MODEL's. Training (`--finetune-from-model`) makes the
    experts differ. The command prints the largest difference between the old and the new output of
    each layer and, for a text with references, the perplexity before and after.
    """
    from nmt_moe import resizing
    from nmt_moe.checkpoints.files import check_output
    from nmt_moe.resizing.comparing import find_reader, measure_difference

    check_output(output, overwrite)
    source = resizing.read_model(model)
    if not text and (reference or target_lang or bundle):
        raise ValueError("`--reference`, `--target-lang` and `--bundle` need `--text`.")
    parts = read_parts(text, reference, target_lang) if text else []
    reader = find_reader(source, bundle) if parts else None

    def change(layers: dict[str, Layer]) -> dict[str, Layer]:
        return {s: resizing.upcycle(one, num_experts, top_k) for s, one in layers.items()}

    changed = change(source.layers)
    note = (
        f"Upcycled: each layer's only expert became {num_experts}; each token uses {top_k} of them."
    )
    source.write(output, changed, note, overwrite)
    for side, layer in changed.items():
        difference = measure_difference(source.layers[side], layer)
        click.echo(
            f"{side}: the layer's old and new outputs differ by at most {difference:.1e} (float64)"
        )
    if reader is not None:
        surveys = _survey(reader.path, parts)
        _print_perplexity(source, reader, output, change(reader.layers), surveys, parts)
    click.echo(f"{output}: written")


def _survey(folder: Path, parts: list[Part]) -> list[Survey]:
    from nmt_moe.inspection import load_model
    from nmt_moe.resizing import survey

    model = load_model(folder)
    return [survey(model, part, progress=sys.stderr.isatty()) for part in parts]


for subcommand in (stats, prune, merge, upcycle):
    experts.add_command(subcommand)
