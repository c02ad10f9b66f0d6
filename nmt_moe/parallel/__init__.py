"""Where rows go: the only folder that may talk to other ranks."""

from nmt_moe.parallel.exchange import LocalExchange, LocalRoute

__all__ = ["LocalExchange", "LocalRoute"]
