"""Three products with one matrix per expert, and the choice of how to compute them."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.kernels import _memory
from nmt_moe.kernels._backend import uses_triton
from nmt_moe.kernels._cpu import has_compiled_loops, load
from nmt_moe.kernels._matmul import multiply_into

# torch's grouped product is public in newer versions, private in older ones, and absent in 2.6.
GROUPED_MM: Callable[..., Tensor] | None = getattr(
    F, "grouped_mm", getattr(torch, "_grouped_mm", None)
)
# torch's grouped product requires fewer groups than this.
MAX_GROUPS = 1024
# With fewer rows per expert than this, reading the weights costs more than multiplying by them.
# In that case, torch's grouped product has been reported to reach only a fifth of the memory
# bandwidth; this project has not measured it.
MIN_MEAN_ROWS = 128
# Compute capabilities 9 (Hopper) and 10 (Blackwell). On other devices, torch's grouped product is a
# loop that waits for the offsets.
FAST_CAPABILITIES = (9, 10)


class Products(Protocol):
    """Products of rows with their experts' matrices, for one set of offsets."""

    def multiply(self, rows: Tensor, weight: Tensor, relu: bool = False) -> Tensor:
        """Compute rows @ weight, followed by a ReLU if `relu`: (R, D), (L, D, F) -> (R, F)."""

    def multiply_back(
        self,
        grad: Tensor,
        weight: Tensor,
        mask: Tensor | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Compute grad @ weight^T: (R, F), (L, D, F) -> (R, D).

        The result is 0 wherever `mask`, (R, D), is 0. If `add_to`, (R, D), is given, the result is
        added to it in place, without a mask.
        """

    def weight_gradient(self, rows: Tensor, grad: Tensor) -> Tensor:
        """Compute each expert's rows^T @ grad: (R, D), (R, F) -> (L, D, F).

        The result is 0 for experts without rows.
        """


class LoopProducts:
    """Products computed one after another for each expert that has rows.

    Attributes:
        runs: Each expert that has rows, with the slice of its rows.
    """

    def __init__(self, bounds: list[int]) -> None:
        self._num_experts = len(bounds) - 1
        self.runs = [
            (expert, slice(start, end))
            for expert, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
            if end > start
        ]

    def multiply(self, rows: Tensor, weight: Tensor, relu: bool = False) -> Tensor:
        out = rows.new_empty(len(rows), weight.shape[2])
        # Split once instead of slicing for each expert, because a slice takes noticeable time
        # compared with a product of a few rows.
        sizes = [run.stop - run.start for _, run in self.runs]
        spare = len(rows) - sum(sizes)  # rows that belong to no expert
        parts = zip(
            self.runs, rows.split([*sizes, spare]), out.split([*sizes, spare]), strict=False
        )
        for (expert, _), own_rows, own_out in parts:
            multiply_into(own_out, own_rows, weight[expert])
        return out.relu_() if relu else out

    def multiply_back(
        self,
        grad: Tensor,
        weight: Tensor,
        mask: Tensor | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        if add_to is not None:
            for expert, run in self.runs:
                multiply_into(add_to[run], grad[run], weight[expert].t(), accumulate=True)
            return add_to
        out = self.multiply(grad, weight.transpose(1, 2))
        return out if mask is None else relu_gradient_(out, mask)

    def weight_gradient(self, rows: Tensor, grad: Tensor) -> Tensor:
        out = _memory.empty((self._num_experts, rows.shape[1], grad.shape[1]), rows)
        first_idle = 0
        for expert, run in self.runs:
            if expert > first_idle:
                out[first_idle:expert].zero_()
            multiply_into(out[expert], rows[run].t(), grad[run])
            first_idle = expert + 1
        out[first_idle:].zero_()
        return out


class CompiledProducts(LoopProducts):
    """Products computed by compiled loops, which are faster for experts with few rows.

    For an expert with more rows, the loops call the same library as `LoopProducts`.
    """

    def __init__(self, expert_offsets: Tensor) -> None:
        super().__init__(expert_offsets.tolist())
        self._expert_offsets = expert_offsets

    def multiply(self, rows: Tensor, weight: Tensor, relu: bool = False) -> Tensor:
        if not weight.is_contiguous():
            return super().multiply(rows, weight, relu)
        out = rows.new_empty(len(rows), weight.shape[2])
        load().multiply_experts(rows.contiguous(), weight, self._expert_offsets, out)
        return out.relu_() if relu else out


class TorchProducts:
    """Products computed by torch's grouped product.

    On CUDA, it is used for bfloat16 on Hopper and Blackwell, with at most 1023 experts. On the CPU,
    it runs the same loop as `LoopProducts`, but without Python between the products. The operands
    are laid out as torch requires when some experts have no rows.
    """

    def __init__(self, expert_offsets: Tensor) -> None:
        self._expert_offsets = expert_offsets
        self._ends = expert_offsets[1:].to(torch.int32)

    def multiply(self, rows: Tensor, weight: Tensor, relu: bool = False) -> Tensor:
        out = self._grouped_mm(rows, weight.contiguous())
        return out.relu_() if relu else out

    def multiply_back(
        self,
        grad: Tensor,
        weight: Tensor,
        mask: Tensor | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        out = self._grouped_mm(grad, weight.contiguous().transpose(1, 2))
        if add_to is not None:
            return add_to.add_(out)
        return out if mask is None else relu_gradient_(out, mask)

    def weight_gradient(self, rows: Tensor, grad: Tensor) -> Tensor:
        out = self._grouped_mm(rows.t(), grad)
        # torch's product leaves the gradients of experts without rows unwritten.
        if uses_triton(out, "grouped_gemm"):
            from nmt_moe.kernels._triton.grouped_gemm import zero_idle_experts

            zero_idle_experts(out, self._expert_offsets)
        else:
            idle = self._expert_offsets.diff() == 0
            out.masked_fill_(idle[:, None, None], 0.0)
        return out

    def _grouped_mm(self, left: Tensor, right: Tensor) -> Tensor:
        assert GROUPED_MM is not None
        return GROUPED_MM(left, right, offs=self._ends)


class TritonProducts:
    """Products computed by this project's Triton kernels.

    They accept any number of experts and rows, in float32, bfloat16 and float16.
    """

    def __init__(
        self,
        expert_offsets: Tensor,
        num_rows: int,
        dtype: torch.dtype,
        precision: str | None = None,
    ) -> None:
        """Plan the products.

        Args:
            expert_offsets: (L + 1,) int64; expert e owns rows [offsets[e], offsets[e + 1]).
            num_rows: Number of rows, R.
            dtype: Data type of the rows.
            precision: How float32 is rounded: "ieee", "tf32" or "tf32x3"; None to follow
                torch's setting.
        """
        from nmt_moe.kernels._triton import grouped_gemm

        self._kernels, self._precision = grouped_gemm, precision
        self._expert_offsets = expert_offsets
        block_rows = grouped_gemm.choose_block_rows(num_rows, len(expert_offsets) - 1, dtype)
        self._tiles = grouped_gemm.list_tiles(expert_offsets, num_rows, block_rows)

    def multiply(self, rows: Tensor, weight: Tensor, relu: bool = False) -> Tensor:
        return self._multiply(rows, weight, relu)

    def multiply_back(
        self,
        grad: Tensor,
        weight: Tensor,
        mask: Tensor | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        return self._multiply(grad, weight.transpose(1, 2), mask=mask, add_to=add_to)

    def _multiply(self, rows: Tensor, weight: Tensor, relu: bool = False, **named: Any) -> Tensor:
        named["precision"] = self._precision
        return self._kernels.multiply_rows(
            rows, weight, self._expert_offsets, self._tiles, relu, **named
        )

    def weight_gradient(self, rows: Tensor, grad: Tensor) -> Tensor:
        block_rows = self._tiles.block_rows
        if len(self._expert_offsets) == 2:
            return self._kernels.one_weight_gradient(rows, grad, block_rows, self._precision)
        return self._kernels.weight_gradient(
            rows, grad, self._expert_offsets, block_rows, self._precision
        )


def choose_products(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Products:
    """Choose how to multiply, based only on device, dtype and shape, without waiting for CUDA.

    Args:
        rows: (R, D), sorted by expert.
        weight: (L, D, F), the experts' matrices.
        expert_offsets: (L + 1,) int64; expert e owns rows [offsets[e], offsets[e + 1]).
    """
    if suits_grouped_mm(rows, weight):
        return TorchProducts(expert_offsets)
    if uses_triton(rows, "grouped_gemm"):
        return TritonProducts(expert_offsets, len(rows), rows.dtype)
    return LoopProducts(expert_offsets.tolist())


def choose_evaluation_products(
    rows: Tensor, weight_in: Tensor, weight_out: Tensor, expert_offsets: Tensor
) -> Products:
    """Choose how to multiply a few rows on the CPU if no gradient is needed.

    Args:
        rows: (R, D), sorted by expert.
        weight_in: (L, D, H), the experts' first matrices.
        weight_out: (L, H, D), the experts' second matrices.
        expert_offsets: (L + 1,) int64; expert e owns rows [offsets[e], offsets[e + 1]).
    """
    if has_compiled_loops(rows, weight_in, weight_out):
        return CompiledProducts(expert_offsets)
    if loops_in_torch(rows, weight_in, weight_out):
        return TorchProducts(expert_offsets)
    return LoopProducts(expert_offsets.tolist())


def loops_in_torch(rows: Tensor, *weights: Tensor) -> bool:
    """Return whether torch's grouped product accepts these operands on the CPU.

    It accepts them if this version of torch has the public function and the operands are aligned to
    16 bytes.
    """
    return (
        hasattr(F, "grouped_mm")
        and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(
            weight.data_ptr() % 16 == 0 and weight.shape[2] * weight.element_size() % 16 == 0
            for weight in weights
        )
    )


def suits_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """Return whether torch's grouped product accepts these operands and is fast on them."""
    num_experts, dim, out_dim = weight.shape
    return (
        GROUPED_MM is not None
        and rows.is_cuda
        and rows.dtype == torch.bfloat16
        and 1 <= num_experts < MAX_GROUPS
        and num_experts * MIN_MEAN_ROWS <= len(rows) < 2**31  # its offsets are int32
        and dim % 8 == 0  # its loads need multiples of 16 bytes
        and out_dim % 8 == 0
        and torch.cuda.get_device_capability(rows.device)[0] in FAST_CAPABILITIES
    )


def relu_gradient_(grad: Tensor, relu_output: Tensor) -> Tensor:
    """Set `grad` to 0 in place wherever the ReLU's output is 0, and return it."""
    return torch.ops.aten.threshold_backward.grad_input(grad, relu_output, 0, grad_input=grad)
