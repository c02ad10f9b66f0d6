"""Limits on clients' requests."""

from __future__ import annotations

from dataclasses import dataclass

from nmt_moe.checks import check_range, check_whole

# Maximum beam size. Each hypothesis costs as much as another sentence.
MAX_BEAM = 20
MAX_ALTERNATIVES = 10
# A body that is incomplete after this many seconds is refused.
BODY_SECONDS = 10.0


@dataclass(frozen=True)
class ServerSettings:
    """Limits and access rights of a server.

    Attributes:
        max_characters: Maximum number of characters in all texts of a request.
        max_items: Maximum number of texts in a request.
        max_waiting: Maximum number of requests being read, waiting or being translated at a time;
            further requests get status 503.
        time_limit: Seconds after which an unanswered request gets status 503.
        origins: Other web origins that may send requests, such as "https://example.org"; "*" for
            all.
        keys: API keys; each request must present one of them, unless there are none.
    """

    max_characters: int = 20_000
    max_items: int = 128
    max_waiting: int = 256
    time_limit: float = 60.0
    origins: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole("max_characters", self.max_characters, 1, 10_000_000)
        check_whole("max_items", self.max_items, 1, 100_000)
        check_whole("max_waiting", self.max_waiting, 1, 100_000)
        check_range("time_limit", self.time_limit, 0.001, 86_400.0)
        for origin in self.origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(
                    f"`origins` must be addresses such as 'https://example.org', or '*', but has "
                    f"{origin!r}."
                )

    @property
    def max_body(self) -> int:
        """Return the maximum number of bytes in a body. An escaped character takes up to 12."""
        return 12 * self.max_characters + 64 * self.max_items + 4096
