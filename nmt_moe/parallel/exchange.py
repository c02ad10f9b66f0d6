"""The route of rows to their experts and back."""

from torch import Tensor


class LocalRoute:
    """Every expert lives here: rows stay where they are."""

    def __init__(self, expert_offsets: Tensor) -> None:
        self.expert_offsets = expert_offsets

    def to_experts(self, rows: Tensor) -> Tensor:
        """Bring rows to the owners of their experts: (R, D) to (R, D)."""
        return rows

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Bring answers back to where their tokens are: (R, D) to (R, D)."""
        return rows


class LocalExchange:
    """The exchange of one rank, or of ranks that each hold all experts."""

    def route(self, expert_offsets: Tensor) -> LocalRoute:
        """Plan the route of one batch from its (E + 1,) expert offsets."""
        return LocalRoute(expert_offsets)
