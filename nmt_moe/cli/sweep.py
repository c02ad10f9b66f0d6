"""`nmt-moe sweep`: tune alpha and beta of GNMT's search."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command, list_option
from nmt_moe.cli._paths import FILE, NEW_FILE
from nmt_moe.text.lines import read_lines

GRID = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
VALUES = " ".join(f"{value:g}" for value in GRID)


@command(
    "sweep",
    """
fairseq-generate data-bin --user-dir nmt_moe --path model.pt --gen-subset valid --beam 8 \\
    --nbest 8 --print-alignment soft --remove-bpe sentencepiece > nbest.txt
nmt-moe sweep nbest.txt
nmt-moe sweep nbest.txt --reference valid.de --alphas 0 0.2 0.4 --plot grid.png
""",
)
@click.argument("nbest", type=FILE)
@click.option("--reference", type=FILE, help="Reference text of the split (default: the T- lines).")
@list_option("--alphas", type=float, default=GRID, help=f"Length penalties ({VALUES}).")
@list_option("--betas", type=float, default=GRID, help=f"Coverage penalties ({VALUES}).")
@click.option("--plot", type=NEW_FILE, help="PNG to write with the grid; needs matplotlib.")
def sweep(
    nbest: Path,
    reference: Path | None,
    alphas: tuple[float, ...],
    betas: tuple[float, ...],
    plot: Path | None,
) -> None:
    """Tune alpha and beta of GNMT's search by computing BLEU over a grid from one n-best run.

    NBEST is the output of fairseq-generate. Each point of the grid ranks every n-best list by
    log P / ((5 + length) / 6)^alpha + beta * coverage. The two penalties do not affect the beam;
    they rank finished hypotheses. If --nbest equals --beam and --beam-prune is not used, each point
    is therefore the BLEU of fairseq-generate's output with these penalties; alpha = beta = 0
    corresponds to the option --unnormalized.

    BLEU is computed by sacrebleu. It compares the D- lines with the T- lines of the same file or
    with --reference, which must have one line per sentence of the split. To get scores that can be
    compared with published scores, give the raw text as --reference.
    """
    from nmt_moe.scoring import penalties as lib

    lib.check_grid(alphas, betas)
    found = lib.read_nbest(read_lines(nbest, allow_controls=True))
    references = dict(enumerate(read_lines(reference))) if reference else found.references
    grid, signature = lib.score_grid(found, references, alphas, betas)
    if plot:
        lib.draw_grid(grid, plot)
    best = max(grid, key=grid.__getitem__)
    counts = [len(hypotheses) for hypotheses in found.hypotheses.values()]
    click.echo(lib.format_grid(grid))
    click.echo(
        f"sentences: {len(counts)}, with {min(counts)} to {max(counts)} hypotheses each; "
        f"best: alpha {best[0]:g}, beta {best[1]:g}\n{signature}"
    )
