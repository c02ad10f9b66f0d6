"""Define types for arguments that are paths.

Paths are checked while the command line is parsed, so that a mistyped path is reported before torch
is imported, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

# A folder that contains this file is a bundle.
BUNDLE_FILE = "config.json"


class Existing(click.Path):
    """A path to read from.

    Args:
        kinds: Kinds of paths that are accepted: "file" (or a pipe), "folder", "bundle" (a folder
            that `nmt-moe export` wrote), or "-" for standard input.
        advice: Last sentence of the message, which says what path to name instead.
    """

    def __init__(self, *kinds: str, advice: str = "Check the path.") -> None:
        super().__init__(path_type=Path)
        self.kinds, self.advice = kinds, advice

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path.

        Raises:
            ValueError: if the path does not exist, or is of another kind.
        """
        path = Path(value)
        fault = None if str(value) == "-" and "-" in self.kinds else self._fault(path)
        if fault is not None:
            raise ValueError(f"`{path}` {fault}. {self.advice}")
        return path

    def _fault(self, path: Path) -> str | None:
        if not path.exists():
            return "does not exist"
        if not path.is_dir():
            return None if "file" in self.kinds else "is a file"
        if "folder" in self.kinds:
            return None
        if "bundle" not in self.kinds:
            return "is a folder"
        if not (path / BUNDLE_FILE).is_file():
            return f"has no `{BUNDLE_FILE}`, so it is not a complete bundle"
        return None


class NewFile(click.Path):
    """A file to write, in an existing folder; - stands for standard output."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path.

        Raises:
            ValueError: if the file's folder does not exist, or the path is a folder.
        """
        path = Path(value)
        if path.is_dir():
            raise ValueError(f"`{path}` must be a file to write, but is a folder.")
        if not path.absolute().parent.is_dir():
            raise ValueError(
                f"`{path}` must be in a folder that exists. Create `{path.parent}` first."
            )
        return path


BUNDLE = Existing("bundle", advice="Name a folder that `nmt-moe export` wrote.")
CHECKPOINT = Existing("file", advice="Name a checkpoint, such as checkpoints/checkpoint_best.pt.")
FILE = Existing("file")
FILE_OR_INPUT = Existing("file", "-")
NEW_FILE = NewFile()
# The command creates this path and the folders above it.
NEW_PATH = click.Path(path_type=Path)
