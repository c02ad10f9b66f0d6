"""The mixture of experts in inference: experts' weights are read when a token comes to them."""

from collections.abc import Callable

import torch
from torch import Tensor

from nmt_moe.checks import check_choice, check_shape
from nmt_moe.kernels.gather_rows import sum_rows
from nmt_moe.kernels.quantised import DTYPES, PackedLinear
from nmt_moe.kernels.row_plan import plan_rows


class PackedExperts:
    """One matrix of every expert; each is packed at its first use, and nothing else of it is read.

    The weights may be a memory-mapped file: what is not used never comes into memory.

    Attributes:
        shape: (E, O, I).
    """

    def __init__(self, shape: torch.Size, make: Callable[[int], PackedLinear]) -> None:
        """Use `pack` or `from_int8`."""
        self.shape = shape
        self._make = make
        self._used: dict[int, PackedLinear] = {}

    @classmethod
    def pack(cls, weight: Tensor, dtype: str = "float32") -> "PackedExperts":
        """Hold matrices, in another precision if asked for.

        Args:
            weight: (E, O, I), of floating point. A transposed view of the (E, I, O) that a
                training keeps is as good.
            dtype: "float32", "bfloat16" or "int8".

        Raises:
            ValueError: if the shape or the dtype is not these.
        """
        check_choice("dtype", dtype, DTYPES)
        check_shape("weight", weight, (None, None, None), "(E, O, I)")
        return cls(weight.shape, lambda expert: PackedLinear.pack(weight[expert], dtype=dtype))

    @classmethod
    def from_int8(cls, weight: Tensor, scale: Tensor) -> "PackedExperts":
        """Hold what `quantise_rows` returned.

        Args:
            weight: (E, O, I) int8.
            scale: (E, O) float32.

        Raises:
            ValueError: if the shapes are not these.
        """
        check_shape("weight", weight, (None, None, None), "(E, O, I)")
        check_shape("scale", scale, tuple(weight.shape[:2]), "(E, O)")
        return cls(
            weight.shape, lambda expert: PackedLinear.from_int8(weight[expert], scale[expert])
        )

    def __getitem__(self, expert: int) -> PackedLinear:
        """Return the matrix of one expert."""
        packed = self._used.get(expert)
        if packed is None:
            packed = self._used[expert] = self._make(expert)
        return packed


def packed_mixture_ffn(
    x: Tensor,
    gates: Tensor,
    expert_ids: Tensor,
    weight_in: PackedExperts,
    weight_out: PackedExperts,
) -> Tensor:
    """Compute y = sum over a token's experts of gate times relu(x @ weight_in) @ weight_out.

    One expert after the other takes its tokens; a token's sum runs in the order of its slots.

    Args:
        x: (N, D) float32.
        gates: (N, K) float32. Weights of the chosen experts; 0 in empty slots.
        expert_ids: (N, K) int64. E in an empty slot.
        weight_in: (E, H, D).
        weight_out: (E, D, H).

    Returns:
        (N, D) float32.

    Raises:
        ValueError: if the shapes of weights and tokens do not fit together.

    Source: Shazeer et al. 2017, eq. 1.
    """
    num_experts, hidden_dim, model_dim = weight_in.shape
    check_shape("x", x, (None, model_dim), "(N, D)")
    if tuple(weight_out.shape) != (num_experts, model_dim, hidden_dim):
        raise ValueError(
            f"`weight_out` must have the shape (E, D, H) = {num_experts, model_dim, hidden_dim}, "
            f"but has {tuple(weight_out.shape)}."
        )
    plan = plan_rows(expert_ids, num_experts)
    counts = plan.offsets.diff()
    used = counts.nonzero().squeeze(1)
    rows = x.index_select(0, plan.row_token).split(counts[used].tolist())
    outputs = [
        weight_out[expert](weight_in[expert](own).relu_())
        for expert, own in zip(used.tolist(), rows, strict=True)
    ]
    if not outputs:
        return torch.zeros_like(x)
    return sum_rows(torch.cat(outputs), plan.token_rows, gates)
