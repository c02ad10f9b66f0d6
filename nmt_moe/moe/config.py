"""The sizes and choices of one MoE layer."""

from dataclasses import dataclass

from nmt_moe.checks import check_choice, check_range

GATES = ("noisy_top_k",)


@dataclass(frozen=True)
class MoEConfig:
    """Describe one MoE layer; refuses what cannot be built.

    Attributes:
        model_dim: D, width of tokens.
        hidden_dim: H, hidden width of an expert.
        num_experts: E.
        top_k: K, experts per token.
        gate: One of `GATES`.
        num_groups: Groups of a hierarchical gate; 0 for a flat one.
        importance_weight: w_importance of eq. 7.
        load_weight: w_load of eq. 11.

    Raises:
        ValueError: naming the field, its rule and its value.
    """

    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int = 4
    gate: str = "noisy_top_k"
    num_groups: int = 0
    importance_weight: float = 0.01
    load_weight: float = 0.01

    def __post_init__(self) -> None:
        check_range("model_dim", self.model_dim, 1)
        check_range("hidden_dim", self.hidden_dim, 1)
        check_range("num_experts", self.num_experts, 1)
        check_range("top_k", self.top_k, 1, self.num_experts)
        check_choice("gate", self.gate, GATES)
        # A hierarchy is not there yet; refused here so that no setting is silently ignored.
        check_range("num_groups", self.num_groups, 0, 0)
        check_range("importance_weight", self.importance_weight, 0.0)
        check_range("load_weight", self.load_weight, 0.0)
