"""Where rows go, and which parameters are experts; the only folder that may talk to other ranks."""

from nmt_moe.parallel.exchange import LocalExchange, LocalRoute
from nmt_moe.parallel.gradients import is_expert, mark_expert

__all__ = ["LocalExchange", "LocalRoute", "is_expert", "mark_expert"]
