"""`nmt-moe serve`: serve exported models over HTTP, with a web page."""

from __future__ import annotations

import re
from pathlib import Path

import click

from nmt_moe.checks import check_whole
from nmt_moe.cli._command import check_threads, command
from nmt_moe.cli._paths import BUNDLE, FILE


def check_folders(
    ctx: click.Context, param: click.Parameter, folders: tuple[str, ...]
) -> tuple[str, ...]:
    """Check that each argument is the folder of a bundle, with or without `=FROM:TO` after it."""
    for folder in folders:
        BUNDLE.convert(re.sub(r"=[\w-]+:[\w-]+$", "", folder), param, ctx)
    return folders


@command(
    "serve",
    """
nmt-moe serve en-de
nmt-moe serve en-de de-en --host 0.0.0.0 --port 8080 --keys keys.txt
nmt-moe serve old-model=en:fr --max-characters 5000
curl http://127.0.0.1:5000/translate -d q='A dog runs.' -d source=en -d target=de
""",
)
@click.argument(
    "folders",
    metavar="FOLDER[=FROM:TO]...",
    nargs=-1,
    required=True,
    callback=check_folders,
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=int, default=5000, show_default=True, help="Port to listen on; 0: any free port."
)
@click.option(
    "--max-characters",
    type=int,
    help="Maximum number of characters in a request.  [default: 20000]",
)
@click.option("--max-items", type=int, help="Maximum number of texts in a request.  [default: 128]")
@click.option(
    "--max-waiting", type=int, help="Maximum number of requests at a time.  [default: 256]"
)
@click.option("--time-limit", type=float, help="Seconds a request may take.  [default: 60]")
@click.option("--keys", type=FILE, help="File of API keys, one per line.")
@click.option(
    "--allow-origin", multiple=True, help="Another web origin that may send requests; *: any."
)
@click.option("--threads", type=int, help="Number of CPU threads to use.  [default: torch's]")
def serve(
    folders: tuple[str, ...],
    host: str,
    port: int,
    keys: Path | None,
    allow_origin: tuple[str, ...],
    threads: int | None,
    **limits: float | None,
) -> None:
    """Serve the bundles FOLDER over HTTP, with a web page at / and the APIs described at /docs.

    FROM:TO names the languages of a bundle that does not name them itself. On standard error, the
    first line says what is being loaded. All further lines are a log in JSON, which never contains
    users' text. Its entry "serving" gives the address once the server accepts requests. On Ctrl-C
    or SIGTERM, the server finishes all open requests and then stops.
    """
    check_whole("--port", port, 0, 65535)
    if threads is not None:
        check_threads(threads)
    click.echo(f"loading {' '.join(folders)} ...", err=True)
    try:
        from nmt_moe import serving
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("nmt_moe"):
            raise
        raise ValueError(
            f"the server needs packages that are not installed, among them `{error.name}`: "
            "pip install 'nmt-moe[serve]'."
        ) from error
    given = {name: value for name, value in limits.items() if value is not None}
    settings = serving.ServerSettings(
        **given,  # type: ignore[arg-type]
        origins=allow_origin,
        keys=() if keys is None else serving.read_keys(keys),
    )
    service = serving.Service(serving.Models.open(folders), settings, threads)
    serving.serve(service, host, port)
