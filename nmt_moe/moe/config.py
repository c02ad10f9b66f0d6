"""The configuration of one MoE layer."""

from dataclasses import dataclass

from nmt_moe.checks import check_choice, check_divides, check_range, check_whole

GATES = ("noisy_top_k", "strictly_balanced", "softmax")
RECOMPUTE = ("auto", "always", "never")

# Smallest hidden width at which "auto" recomputes hidden activations. Those of a row are then many
# times larger than the row itself, and recomputing them takes at most a sixth of the experts'
# operations.
LARGE_HIDDEN_DIM = 4096


@dataclass(frozen=True)
class MoEConfig:
    """Configuration of one MoE layer.

    Attributes:
        model_dim: Width of tokens, D.
        hidden_dim: Hidden width of an expert, H.
        num_experts: Number of experts, E.
        top_k: Number of experts per token, K. With groups, the number of groups per token, and the
            number of experts that the token uses in each of them. A "strictly_balanced" gate uses
            this number on average; a "softmax" gate uses all experts.
        gate: Kind of gate, one of `GATES`.
        num_groups: Number of groups of a hierarchical gate, G; 0 for a flat gate.
        importance_weight: Weight of the importance loss, w_importance in eq. 7.
        load_weight: Weight of the load loss, w_load in eq. 11.
        recompute: Whether to recompute experts' hidden activations in the backward pass, with the
            same routing, instead of keeping them: "always", "never", or "auto", which recomputes
            them if `hidden_dim` is at least 4096 (Appendix D).

    Raises:
        ValueError: if a layer with these values cannot be built. The message gives the field, the
            constraint and the value.
    """

    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int = 4
    gate: str = "noisy_top_k"
    num_groups: int = 0
    importance_weight: float = 0.01
    load_weight: float = 0.01
    recompute: str = "auto"

    def __post_init__(self) -> None:
        check_whole("model_dim", self.model_dim, 1)
        check_whole("hidden_dim", self.hidden_dim, 1)
        check_whole("num_experts", self.num_experts, 1)
        check_whole("top_k", self.top_k, 1, self.num_experts)
        check_choice("gate", self.gate, GATES)
        check_choice("recompute", self.recompute, RECOMPUTE)
        check_range("importance_weight", self.importance_weight, 0.0)
        check_range("load_weight", self.load_weight, 0.0)
        check_whole("num_groups", self.num_groups, 0, self.num_experts)
        if self.num_groups:
            self._check_hierarchy()

    def _check_hierarchy(self) -> None:
        if self.gate == "softmax":
            raise ValueError(
                f"`num_groups` must be 0 with the gate 'softmax', which uses all experts, but is "
                f"{self.num_groups}. Use the gate 'noisy_top_k' or 'strictly_balanced'."
            )
        check_divides("num_experts", self.num_experts, "`num_groups`", self.num_groups)
        # Each level chooses `top_k` groups or experts, so it must have at least that many.
        check_range("top_k", self.top_k, 1, min(self.num_groups, self.group_size))

    @property
    def group_size(self) -> int:
        """Return the number of experts in a group."""
        return self.num_experts // self.num_groups

    @property
    def recomputes(self) -> bool:
        """Return whether experts' hidden activations are recomputed in the backward pass."""
        return self.recompute == "always" or (
            self.recompute == "auto" and self.hidden_dim >= LARGE_HIDDEN_DIM
        )
