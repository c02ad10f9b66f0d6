"""Prevent outputs from replacing inputs, and let an output appear only when it is complete."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_outputs(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Reject an output that is an input, another output or a folder.

    Raises:
        ValueError: if an output is rejected; the message names it.
    """
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path.is_dir():
            raise ValueError(f"`{path}` must be a file to write, but is a folder.")
        if path.exists() and not path.is_file():  # such as /dev/null
            continue
        if path.resolve() in taken:
            raise ValueError(f"`{path}` is named twice. Choose a separate name for each output.")
        taken.add(path.resolve())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary `.part` name, and rename the file to `path` unless there is an error.

    /dev/null and similar files are not replaced.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
