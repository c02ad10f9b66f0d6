"""Compute the mixture of experts in inference, reading weights only when a token needs them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.checks import check_choice, check_shape
from nmt_moe.kernels._cpu import has_compiled_loops, load
from nmt_moe.kernels._products import loops_in_torch
from nmt_moe.kernels.quantised import DTYPES, NARROW_FROM, PackedLinear, make_panels

# Maximum number of weights that are copied to float32 together, which takes 16 MiB.
STACKED_BELOW = 1 << 22


class PackedExperts:
    """One matrix per expert, packed when that expert is first used.

    The weights may be mapped from a file. Unused experts are then never read from the file. Only
    small experts, which have at most `STACKED_BELOW` weights in total, are converted to float32 all
    at once.

    Attributes:
        shape: Shape of the matrices, (E, O, I).
    """

    def __init__(
        self,
        shape: torch.Size,
        make: Callable[[int], PackedLinear],
        stack: Callable[[], Tensor] | None,
        check: Callable[[int], None] | None,
    ) -> None:
        """Use `pack` or `from_int8` instead of this constructor."""
        self.shape = shape
        self._make, self._stack, self._check = make, stack, check
        self._packed: dict[int, PackedLinear] = {}
        self._stacked: Tensor | None = None
        self._panels: Tensor | None = None
        self._copies_all = shape.numel() <= STACKED_BELOW
        self._is_checked = torch.full(shape[:1], check is None)
        self._all_are_checked = check is None

    @classmethod
    def pack(
        cls, weight: Tensor, dtype: str = "float32", check: Callable[[int], None] | None = None
    ) -> "PackedExperts":
        """Pack matrices, optionally in another precision.

        Args:
            weight: (E, O, I), floating-point. It may be a transposed view of an (E, I, O) tensor,
                the layout that training uses.
            dtype: Data type to pack the matrices in: "float32", "bfloat16" or "int8".
            check: Function that is called with an expert's index before its first use. It may raise
                an error.

        Raises:
            ValueError: if the shape or dtype is wrong.
        """
        check_choice("dtype", dtype, DTYPES)
        check_shape("weight", weight, (None, None, None), "(E, O, I)")
        weight = weight.detach()
        stack: Callable[[], Tensor] | None = None
        if dtype == "float32" and weight.dtype == torch.float32:
            stack = lambda: weight  # noqa: E731
        elif dtype != "int8" and _is_small(weight):
            stack = lambda: weight.to(getattr(torch, dtype)).float()  # noqa: E731
        return cls(
            weight.shape,
            lambda expert: PackedLinear.pack(weight[expert], dtype=dtype),
            stack,
            check,
        )

    @classmethod
    def from_int8(
        cls, weight: Tensor, scale: Tensor, check: Callable[[int], None] | None = None
    ) -> "PackedExperts":
        """Pack the result of `quantise_rows`.

        Args:
            weight: (E, O, I) int8, the quantised rows.
            scale: (E, O) float32, the factor of each row.
            check: Function that is called with an expert's index before its first use. It may raise
                an error.

        Raises:
            ValueError: if a shape is wrong.
        """
        check_shape("weight", weight, (None, None, None), "(E, O, I)")
        check_shape("scale", scale, tuple(weight.shape[:2]), "(E, O)")
        return cls(
            weight.shape,
            lambda expert: PackedLinear.from_int8(weight[expert], scale[expert]),
            (lambda: weight * scale.unsqueeze(2)) if _is_small(weight) else None,
            check,
        )

    def __getitem__(self, expert: int) -> PackedLinear:
        """Return the matrix of one expert."""
        packed = self._packed.get(expert)
        if packed is None:
            if self._check is not None:
                self._check(expert)
            packed = self._packed[expert] = self._make(expert)
        return packed

    def panels(self) -> Tensor | None:
        """Return all matrices in the layout of `make_panels`, or None if experts are not small."""
        if self._panels is None and self._copies_all and self._stack is not None:
            if load() is None:
                return None
            if self._check is not None:
                for expert in range(self.shape[0]):
                    self._check(expert)
            self._panels = make_panels(self._stack())
        return self._panels

    def stacked(self) -> Tensor | None:
        """Return (E, I, O) float32 for torch's grouped product, or None if experts are packed."""
        stack = self._stack
        if self._stacked is None and stack is not None:
            stacked = stack().mT
            if loops_in_torch(stacked, stacked, stacked.mT):
                self._stacked = stacked
            else:
                self._stack = None
        return self._stacked

    def check(self, expert_ids: Tensor) -> None:
        """Check the experts in `expert_ids`, (R,) int64, that have not been checked yet."""
        if self._all_are_checked or self._check is None:
            return
        for expert in expert_ids[~self._is_checked[expert_ids]].unique().tolist():
            self._check(expert)
            self._is_checked[expert] = True
        self._all_are_checked = bool(self._is_checked.all())


def _is_small(weight: Tensor) -> bool:
    return weight[0].numel() < NARROW_FROM and weight.numel() <= STACKED_BELOW


def packed_mixture_ffn(
    x: Tensor,
    gates: Tensor,
    expert_ids: Tensor,
    weight_in: PackedExperts,
    weight_out: PackedExperts,
) -> Tensor:
    """Compute y = sum over a token's experts of gate times relu(x @ weight_in) @ weight_out.

    Experts are computed one after another, and each token's sum runs in ascending order of its
    experts.

    Args:
        x: (N, D) float32, the tokens' vectors.
        gates: (N, K) float32, the weights of the chosen experts; 0 in empty slots.
        expert_ids: (N, K) int64, the chosen experts; E in an empty slot.
        weight_in: (E, H, D), the experts' first matrices.
        weight_out: (E, D, H), the experts' second matrices.

    Returns:
        (N, D) float32, the outputs y.

    Raises:
        ValueError: if the shapes of weights and tokens do not match.

    Source: Shazeer et al. 2017, eq. 1.
    """
    num_experts, hidden_dim, model_dim = weight_in.shape
    check_shape("x", x, (None, model_dim), "(N, D)")
    if tuple(weight_out.shape) != (num_experts, model_dim, hidden_dim):
        raise ValueError(
            f"`weight_out` must have the shape (E, D, H) = {num_experts, model_dim, hidden_dim}, "
            f"but has {tuple(weight_out.shape)}."
        )
    if x.shape[0] == 0:
        return torch.zeros_like(x)
    panels_in, panels_out = weight_in.panels(), weight_out.panels()
    if panels_in is not None and panels_out is not None:
        return load().mix_experts(x, gates, expert_ids, panels_in, panels_out, hidden_dim)
    stacked_in, stacked_out = weight_in.stacked(), weight_out.stacked()
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(num_experts), right=True, out_int32=True)
    num_rows = int(ends[-1])
    if num_rows < order.shape[0]:  # empty slots have the largest id, so they come last
        sorted_ids, order = sorted_ids[:num_rows], order[:num_rows]
    tokens = order.div(expert_ids.shape[1], rounding_mode="floor")
    rows = x.index_select(0, tokens)
    if stacked_in is None or stacked_out is None:
        outputs = _multiply_packed(rows, sorted_ids, weight_in, weight_out)
    else:
        weight_in.check(sorted_ids)
        weight_out.check(sorted_ids)
        hidden = F.grouped_mm(rows, stacked_in, offs=ends).relu_()
        outputs = F.grouped_mm(hidden, stacked_out, offs=ends)
    outputs.mul_(gates.flatten().index_select(0, order).unsqueeze(1))
    # Add up in ascending order of experts, independently of the other tokens.
    return torch.zeros_like(x).index_add_(0, tokens, outputs)


def _multiply_packed(
    rows: Tensor, sorted_ids: Tensor, weight_in: PackedExperts, weight_out: PackedExperts
) -> Tensor:
    used, counts = sorted_ids.unique_consecutive(return_counts=True)
    outputs = [
        weight_out[expert](weight_in[expert](own).relu_())
        for expert, own in zip(used.tolist(), rows.split(counts.tolist()), strict=True)
    ]
    return torch.cat([*outputs, rows[:0]])


def choose_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the experts with the largest gate logits. The lowest ids win ties.

    Args:
        logits: (N, E) float32.
        top_k: Number of experts per token, K.

    Returns:
        (N, K) gates, the softmax over the chosen logits, and (N, K) int64 experts.

    Source: Shazeer et al. 2017, eqs. 3 and 5.
    """
    if has_compiled_loops(logits):
        return load().choose_experts(logits, top_k)
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :top_k].softmax(dim=1), ids[:, :top_k]
