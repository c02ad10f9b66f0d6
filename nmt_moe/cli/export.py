"""`nmt-moe export`: write a checkpoint as a folder that needs neither fairseq nor training data."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.cli._paths import CHECKPOINT, FILE, NEW_PATH, Existing
from nmt_moe.text.lines import read_lines

DATA = Existing("folder", advice="Name a folder that fairseq-preprocess wrote.")


@command(
    "export",
    """
nmt-moe export checkpoints/checkpoint_best.pt --data data-bin --pieces spm.model --output en-de
nmt-moe export average.pt --data data-bin --pieces spm.model --output en-de-int8 --dtype int8
nmt-moe export lm.pt --data text-bin --pieces spm.model --output my-language-model
""",
)
@click.argument("checkpoint", type=CHECKPOINT)
@click.option("--data", type=DATA, required=True, help="Folder that fairseq-preprocess wrote.")
@click.option(
    "--pieces", type=FILE, help="sentencepiece model; without it, text is split at spaces."
)
@click.option(
    "--target-pieces", type=FILE, help="sentencepiece model of the target, if it has its own."
)
@click.option("--output", type=NEW_PATH, required=True, help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="Type of the stored weights. int8 needs a quarter of float32's space and is faster.",
)
@click.option(
    "--source-lang", help="Source language; needed if neither the checkpoint nor its data names it."
)
@click.option(
    "--target-lang", help="Target language; needed if neither the checkpoint nor its data names it."
)
@click.option(
    "--lowercase", is_flag=True, help="Convert source text to lower case, as in training."
)
@click.option(
    "--normalize-punctuation",
    is_flag=True,
    help="Normalise punctuation in source text by Moses's rules, as in training.",
)
@click.option("--beam", type=int, help="The bundle's default beam size.  [default: 5]")
@click.option(
    "--lenpen",
    type=float,
    help="The bundle's default length exponent, as in fairseq.  [default: 1]",
)
@click.option(
    "--length-penalty-alpha", type=float, help="The bundle's default for GNMT's length penalty."
)
@click.option(
    "--coverage-penalty-beta", type=float, help="The bundle's default for GNMT's coverage penalty."
)
@click.option("--beam-prune", type=float, help="The bundle's default for GNMT's pruning, in nats.")
@click.option("--scores", type=FILE, help="Text for the model card, such as sacrebleu's output.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
def export(
    checkpoint: Path,
    data: Path,
    pieces: Path | None,
    target_pieces: Path | None,
    output: Path,
    dtype: str,
    source_lang: str | None,
    target_lang: str | None,
    lowercase: bool,
    normalize_punctuation: bool,
    scores: Path | None,
    overwrite: bool,
    **search: float | None,
) -> None:
    """Write CHECKPOINT as a bundle: a folder for `nmt-moe translate` and `nmt_moe.Translator`.

    CHECKPOINT may have been written by one process or several, and may be averaged. It contains a
    translation model for one or many directions, or a language model. The bundle contains the
    weights, vocabulary, pieces, text pipeline, search defaults and model card, and the SHA-256 hash
    of every file.
    """
    from nmt_moe.inference import Description, Pieces, SearchDefaults, TextPipeline
    from nmt_moe.inference import export as write_bundle

    names = {"beam": "beam_size", "lenpen": "length_exponent"}
    given = {names.get(name, name): value for name, value in search.items() if value is not None}
    languages = tuple(name for name in (source_lang, target_lang) if name is not None)
    if target_pieces is not None and pieces is None:
        raise ValueError(
            "`--target-pieces` needs `--pieces`, the sentencepiece model of the source."
        )
    description = Description(
        languages,
        TextPipeline(lowercase, normalize_punctuation),
        SearchDefaults(**given),  # type: ignore[arg-type]
        "" if scores is None else "\n".join(read_lines(scores)),
    )
    summary = write_bundle(
        checkpoint, data, Pieces(pieces, target_pieces), output, dtype, description, overwrite
    )
    click.echo(f"{output}: {summary}")
