"""Extract the code blocks of Markdown pages, as readers would paste them."""

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A code block of a page; `reason` says why tests do not run it, and is None if they do."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None


def pages() -> list[str]:
    """Return the paths, within the repository, of the pages that people read first."""
    files = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
    return sorted(path.relative_to(REPOSITORY).as_posix() for path in files)


def blocks(page: str) -> list[Block]:
    """Return the bash and Python blocks of a page in order."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("code")),
            found["language"],
            found["code"],
            found["reason"],
        )
        for found in BLOCK.finditer(text)
    ]
