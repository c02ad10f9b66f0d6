"""`nmt-moe average`: average several checkpoints of a training run."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command, list_option
from nmt_moe.cli._paths import NEW_FILE, Existing

COUNTS = {
    "last": "the N newest epoch or update checkpoints, by number of updates",
    "num_epoch_checkpoints": "the N newest `checkpointE.pt`",
    "num_update_checkpoints": "the N newest `checkpoint_E_U.pt`",
    "num_best_checkpoints": "the N best that --keep-best-checkpoints kept",
}


@command(
    "average",
    """
nmt-moe average --inputs checkpoint8.pt checkpoint9.pt checkpoint10.pt --output average.pt
nmt-moe average --inputs checkpoints --last 5 --output average.pt
nmt-moe average --inputs checkpoints --num-best-checkpoints 5 --output average.pt
""",
)
@list_option(
    "--inputs",
    required=True,
    type=Existing("file", "folder"),
    help="Checkpoints, or a folder to choose them from.",
)
@click.option("--output", required=True, type=NEW_FILE, help="Checkpoint to write.")
@click.option("--last", type=int, metavar="N", help=f"From the folder: {COUNTS['last']}.")
@click.option(
    "--num-epoch-checkpoints",
    type=int,
    metavar="N",
    help=f"From the folder: {COUNTS['num_epoch_checkpoints']}.",
)
@click.option(
    "--num-update-checkpoints",
    type=int,
    metavar="N",
    help=f"From the folder: {COUNTS['num_update_checkpoints']}.",
)
@click.option(
    "--num-best-checkpoints",
    type=int,
    metavar="N",
    help=f"From the folder: {COUNTS['num_best_checkpoints']}.",
)
@click.option(
    "--checkpoint-upper-bound", type=int, metavar="N", help="The last epoch or update to include."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def average(
    inputs: tuple[Path, ...],
    output: Path,
    checkpoint_upper_bound: int | None,
    overwrite: bool,
    **counts: int | None,
) -> None:
    """Average the parameters of several checkpoints into a new checkpoint.

    The checkpoints come from one training run, or from several that started from the same model.
    The result can translate, but training cannot resume from it: it has no optimizer state.
    """
    from nmt_moe.checkpoints.average import average_checkpoints

    chosen = {name: count for name, count in counts.items() if count is not None}
    paths = choose(list(inputs), chosen, checkpoint_upper_bound)
    average_checkpoints(paths, output, overwrite)
    click.echo(f"{output}: average of {', '.join(map(str, paths))}")


def choose(inputs: list[Path], counts: dict[str, int], upper_bound: int | None) -> list[Path]:
    """Return the checkpoints that the options select."""
    from nmt_moe.checkpoints import average
    from nmt_moe.checks import check_range

    names = ", ".join(f"`--{name.replace('_', '-')}`" for name in COUNTS)
    if not counts and upper_bound is None and not any(path.is_dir() for path in inputs):
        return inputs
    if len(counts) != 1 or len(inputs) != 1:
        raise ValueError(f"name either several checkpoints, or one folder and one of {names}")
    ((name, count),) = counts.items()
    check_range(f"--{name.replace('_', '-')}", count, 1)
    if name == "last":
        return average.find_last(inputs[0], count, upper_bound)
    if name == "num_best_checkpoints":
        if upper_bound is not None:
            raise ValueError(
                "`--checkpoint-upper-bound` does not apply to `--num-best-checkpoints`: omit it."
            )
        return average.find_best(inputs[0], count)
    pattern = average.BY_EPOCH if name == "num_epoch_checkpoints" else average.BY_UPDATE
    return average.find_numbered(inputs[0], pattern, count, upper_bound)
