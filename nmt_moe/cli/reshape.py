"""`nmt-moe reshape`: verify, merge or split checkpoints with expert files."""

from __future__ import annotations

from pathlib import Path

import click

from nmt_moe.cli._command import command
from nmt_moe.cli._paths import CHECKPOINT, NEW_PATH


@command(
    "reshape",
    """
nmt-moe reshape verify checkpoints/checkpoint_best.pt
nmt-moe reshape merge checkpoints/checkpoint_best.pt --output whole.pt
nmt-moe reshape split whole.pt --files 8 --output parts/checkpoint_last.pt
""",
)
@click.argument("action", type=click.Choice(["verify", "merge", "split"]))
@click.argument("checkpoint", type=CHECKPOINT)
@click.option("--output", type=NEW_PATH, help="Checkpoint to write.")
@click.option("--files", type=int, help="For `split`: number of expert files to write.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def reshape(
    action: str, checkpoint: Path, output: Path | None, files: int | None, overwrite: bool
) -> None:
    """Verify, merge or split a checkpoint.

    Training on several processes (`--expert-parallel-size`) stores experts in files beside the
    checkpoint. Every command can read such files. Use `merge` or `split` to copy a checkpoint,
    or to move it to machines with more or less memory.

    \b
    verify: read all files, and check that they fit the model in the configuration.
    merge: write one ordinary checkpoint.
    split: write the experts into `--files` files. Both kinds of checkpoint are accepted.

    The optimizer state is kept.
    """  # noqa: D301 - \b keeps the list as it is
    from nmt_moe.checkpoints import reshape as library

    if action == "verify":
        if output is not None or files is not None:
            raise ValueError("`verify` writes nothing: leave `--output` and `--files` out")
        click.echo(f"{checkpoint}: {verify(checkpoint)}")
        return
    if output is None or (files is None) != (action == "merge"):
        needed = "only `--output`" if action == "merge" else "`--output` and `--files`"
        raise ValueError(f"`{action}` needs {needed}")
    if files is None:
        library.merge(checkpoint, output, overwrite)
        click.echo(f"{output}: {checkpoint} in one file")
    else:
        library.split(checkpoint, output, files, overwrite)
        click.echo(f"{output}: {checkpoint}; expert files: {files}")


def verify(path: Path) -> str:
    """Read a checkpoint with all its files, and check that its tensors fit its model.

    Returns:
        A description of the checkpoint's contents.

    Raises:
        ValueError: if a file or tensor is missing, damaged or of the wrong shape. The message names
            it.
    """
    from nmt_moe import plugin
    from nmt_moe.checkpoints import MANIFEST, read_checkpoint, restore_experts
    from nmt_moe.models._fit import check_fits_its_model

    state = read_checkpoint(path)
    manifest = state.get(MANIFEST)
    restore_experts(path, state)
    plugin.register()
    model = check_fits_its_model(str(path))
    fits = f"fits `{model}`" if model else "not compared with its model, which belongs to fairseq"
    if manifest is None:
        return f"complete, in one file, {fits}"
    size = sum(entry["bytes"] for entry in manifest["files"]) / 1e6
    count = len(manifest["files"])
    experts = f"experts: {manifest['num_experts']}, expert files: {count} ({size:.1f} MB)"
    return f"complete, {experts}, {fits}"
