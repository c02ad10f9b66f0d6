"""What a server is allowed to be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from nmt_moe.checks import check_range, check_whole

# Of one search; each hypothesis costs as much as one more sentence.
MAX_BEAM = 20
MAX_ALTERNATIVES = 10
# A body that is not whole after so many seconds is refused.
BODY_SECONDS = 10.0


@dataclass(frozen=True)
class ServerSettings:
    """Limits and rights of a server.

    Attributes:
        max_characters: Of all texts of a request.
        max_items: Texts of a request.
        max_waiting: Requests that are read, wait or are translated at a time; further ones get
            status 503.
        time_limit: Seconds until a request that is not answered gets status 503.
        origins: Web pages elsewhere that may ask, such as "https://example.org"; "*" for all.
        keys: One of which each request must show; none: everyone may ask.
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
        """Bytes of a body: a character takes 12 at most, in JSON's and in a form's escapes."""
        return 12 * self.max_characters + 64 * self.max_items + 4096
