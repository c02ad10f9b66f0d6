"""Errors that a client receives."""

from __future__ import annotations

from typing import Any

SHOWN = 60


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: Status of the HTTP response.
        message: Description of the error. It quotes only short wrong values from the user's input.
        headers: Further headers of the response.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


class BusyError(RequestError):
    """A request refused because the server is overloaded; the client may try again."""

    def __init__(self, message: str, seconds: int = 1) -> None:
        super().__init__(503, message, {"Retry-After": str(seconds)})


class ClientGoneError(Exception):
    """A client that closed its connection before it got a response."""


def show(value: Any) -> str:
    """Format a wrong value for a message: shorten it, and escape unprintable characters."""
    if isinstance(value, str):
        short = repr(value if len(value) <= SHOWN else value[:SHOWN] + "...")
        return short.encode("utf-8", "backslashreplace").decode("utf-8")
    names = {dict: "a table", list: "a list", type(None): "null", bool: "true or false"}
    if type(value) in names and not isinstance(value, bool):
        return names[type(value)]
    return str(value)[:SHOWN].lower() if isinstance(value, bool | int | float) else "something else"
