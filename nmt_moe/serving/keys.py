"""Read API keys from a file with one key per line, and check the keys that clients send."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path


def read_keys(path: Path) -> tuple[str, ...]:
    """Read keys, one per line. Skip blank lines and lines that begin with #.

    Raises:
        ValueError: if the file has no keys or is not text, or if a key contains spaces.
        OSError: if the file cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"`{path}` is not UTF-8. Write one key per line.") from None
    stripped = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    keys = [(number, line) for number, line in stripped if line and not line.startswith("#")]
    for number, key in keys:
        if len(key.split()) != 1:
            raise ValueError(
                f"`{path}` has more than one word on line {number}. Write one key per line."
            )
    if not keys:
        raise ValueError(f"`{path}` contains no keys. Write one key per line.")
    return tuple(key for _, key in keys)


class Keys:
    """The accepted keys.

    The time that a comparison takes does not reveal how much of a key is correct.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def know(self, key: str) -> bool:
        """Return whether a key is one of these, after comparing it with all of them."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, own) for own in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
