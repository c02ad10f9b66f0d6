"""Products with weights packed for inference: float32, bfloat16 or int8.

Quantisation to int8 is symmetric. Each row of weights and each row of activations has its own
scale. The scale of a row of activations is computed when the row is multiplied. Rows never share a
scale, so the result for a row does not depend on the other rows of its batch.
"""

import threading
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.checks import check_choice, check_shape
from nmt_moe.kernels._cpu import load

DTYPES = ("float32", "bfloat16", "int8")
WEIGHT_LEVELS = 127
# FBGEMM needs unsigned activations and a zero point. Without the instructions that add up products
# of bytes in 32 bits (VNNI), it adds pairs of products in 16 bits, with saturation. With 63 levels,
# activations are at most 127 after the zero point is added, and 2 * 127 * 127 still fits.
WIDE_LEVELS, NARROW_LEVELS = 127, 63
# Smallest divisor, so that rows of zeros do not give NaN.
SMALLEST_SCALE = 1e-30

# The next two thresholds were chosen with `benchmarks/inference_products.py`. Its results are in
# `benchmarks/results/inference.md`.

# With at least this many weights, and without compiled loops, oneDNN's product with weights in its
# own layout is faster than BLAS for more than one row. For a single row, the matrix is read fastest
# if it has one row per input.
PACKED_FROM = 1 << (22 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 19)
# With at least this many weights, bfloat16 and int8 are faster than float32, because they read
# fewer bytes. With fewer weights, rounding the activations takes longer than it saves.
NARROW_FROM = 1 << 20

# Number of rows of a weight in a panel, as in `_cpu/inference_loops.h`.
PANEL = 16

# Number of rows in a tile. If there are more rows, they are padded to a multiple of ROWS_STEP.
FEW_ROWS, ROWS_STEP = 16, 32

# Maps rows, (R, I), and an addend, (O,), (R, O) or None, to a result, (R, O).
Product = Callable[[Tensor, Tensor | None], Tensor]
_engine_lock = threading.Lock()


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 levels, symmetric around zero.

    Args:
        weight: (..., O, I), floating-point: one matrix, or one for each expert.

    Returns:
        (..., O, I) int8 levels from -127 to 127, and (..., O) float32 scales. Level times scale is
        as close to `weight` as this scale allows. A row of zeros has the scale 0.

    Raises:
        ValueError: if a weight is infinite or NaN.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=-1) / WEIGHT_LEVELS
    if not torch.isfinite(scale).all():
        raise ValueError("`weight` must be finite, but has infinities or NaN.")
    levels = weight / scale.clamp_min(SMALLEST_SCALE).unsqueeze(-1)
    return levels.round_().to(torch.int8), scale


class PackedLinear:
    """The function y = x W^T + b, with W packed for this machine's processor at the first call.

    Attributes:
        shape: Shape of W, (O, I).
        dtype: Data type of the weights: "float32", "bfloat16" or "int8". Activations are float32.
        bias: (O,) float32, b; None for 0.
    """

    def __init__(
        self, shape: torch.Size, dtype: str, make: Callable[[], Product], bias: Tensor | None
    ) -> None:
        """Use `pack` or `from_int8` instead of this constructor."""
        self.shape, self.dtype, self.bias = shape, dtype, bias
        self._make: Callable[[], Product] | None = make
        self._product: Product

    @classmethod
    def pack(
        cls, weight: Tensor, bias: Tensor | None = None, dtype: str = "float32"
    ) -> "PackedLinear":
        """Pack a matrix, in another precision if requested.

        Args:
            weight: (O, I), floating-point.
            bias: (O,) float32, added to each result.
            dtype: Data type to pack the matrix in: "float32", "bfloat16" or "int8".

        Raises:
            ValueError: if a shape or the dtype is wrong.
        """
        check_choice("dtype", dtype, DTYPES)
        _check_matrix(weight, bias)
        if dtype == "int8":
            return cls.from_int8(*quantise_rows(weight), bias)
        make: Callable[[Tensor], Product]
        make = _Float32Product if dtype == "float32" else _pack_bfloat16
        weight = weight.detach()
        return cls(weight.shape, dtype, lambda: make(weight), bias)

    @classmethod
    def from_int8(cls, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> "PackedLinear":
        """Pack the result of `quantise_rows`.

        Args:
            weight: (O, I) int8, from -127 to 127.
            scale: (O,) float32, the factor of each row.
            bias: (O,) float32, added to each result.

        Raises:
            ValueError: if a shape is wrong.
        """
        _check_matrix(weight, bias)
        check_shape("scale", scale, (len(weight),), "(O,)")
        return cls(weight.shape, "int8", lambda: _pack_int8(weight, scale), bias)

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Multiply rows by W^T.

        Args:
            x: (..., I) float32, the rows.
            addend: (..., O) float32, added to the product instead of the bias.

        Returns:
            (..., O) float32.
        """
        product = self._prepare()
        addend = self.bias if addend is None else addend
        if x.dim() == 2:
            return product(x, addend)
        if addend is not None and addend.dim() > 1:
            addend = addend.reshape(-1, addend.shape[-1])
        return product(x.reshape(-1, x.shape[-1]), addend).view(*x.shape[:-1], -1)

    def panels(self) -> Tensor | None:
        """Return W in the layout of `make_panels`, or None if compiled loops do not multiply it."""
        product = self._prepare()
        return product.panels() if isinstance(product, _Float32Product) else None

    def _prepare(self) -> Product:
        make = self._make  # if two threads both pack the matrix, they get the same result
        if make is not None:
            self._product = make()
            self._make = None
        return self._product


def _check_matrix(weight: Tensor, bias: Tensor | None) -> None:
    check_shape("weight", weight, (None, None), "(O, I)")
    if bias is not None:
        check_shape("bias", bias, (len(weight),), "(O,)")


@cache
def has_fbgemm() -> bool:
    """Return whether torch has FBGEMM, which multiplies int8 and half-precision weights on x86."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@cache
def has_tiles() -> bool:
    """Return whether the processor has instructions for tiles of bytes and bfloat16 (AMX)."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


@cache
def activation_levels() -> int:
    """Return the largest quantised activation that keeps FBGEMM's sums exact on this machine."""
    weight = torch.full((8, 64), WEIGHT_LEVELS, dtype=torch.int8)
    packed = _fbgemm_pack(weight, torch.ones(8))
    levels = float(WIDE_LEVELS)
    y = _fbgemm_multiply(torch.full((1, 64), levels), 1.0, WIDE_LEVELS + 1, packed)
    return WIDE_LEVELS if (y == levels * WEIGHT_LEVELS * 64).all() else NARROW_LEVELS


class _Float32Product:
    """A float32 product, computed by compiled loops if possible, otherwise by BLAS or oneDNN.

    The weights are copied into each layout before its first use.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.float()
        self._uses_onednn = weight.numel() >= PACKED_FROM and torch.backends.mkldnn.is_available()
        self._copy: Tensor | None = None
        self._packed: Tensor | None = None

    def panels(self) -> Tensor | None:
        """Return the weights in panels if the loops are compiled, or None otherwise."""
        if load() is None:
            return None
        if self._copy is None:
            self._copy = make_panels(self._weight)
        return self._copy

    def __call__(self, x: Tensor, addend: Tensor | None) -> Tensor:
        if (panels := self.panels()) is not None:
            return load().multiply_panels(x, panels, addend, self._weight.shape[0])
        if self._uses_onednn and x.shape[0] > 1:
            return self._multiply_packed(x, addend)
        if self._copy is None:
            self._copy = self._weight.t().contiguous()
        return torch.mm(x, self._copy) if addend is None else torch.addmm(addend, x, self._copy)

    def _multiply_packed(self, x: Tensor, addend: Tensor | None) -> Tensor:
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous())
        if addend is None or addend.dim() == 1:
            return _onednn_linear(x, self._packed, addend, "none", [], "")
        return _onednn_linear.binary(x, addend, self._packed, None, "add")


def make_panels(weight: Tensor) -> Tensor:
    """Return weights (..., O, I) as panels of 16 rows, (..., ceil(O / 16), I, 16) float32."""
    *rest, num_rows, width = weight.shape
    filled = F.pad(weight.float(), (0, 0, 0, -num_rows % PANEL))
    return filled.view(*rest, -1, PANEL, width).mT.contiguous()


_onednn_linear = torch.ops.mkldnn._linear_pointwise


def _pack_bfloat16(weight: Tensor) -> Product:
    """Keep the weights in 16 bits. Activations are also rounded, except in FBGEMM's products."""
    fits_half = weight.abs().amax() <= torch.finfo(torch.float16).max
    uses_fbgemm = has_fbgemm() and not has_tiles()
    if weight.numel() < NARROW_FROM or (uses_fbgemm and not fits_half):
        return _Float32Product(weight.bfloat16())
    if has_tiles():
        tiled = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous())

        def multiply_tiles(x: Tensor, addend: Tensor | None) -> Tensor:
            y = _onednn_linear(_fill_tiles(x.bfloat16()), tiled, None, "none", [], "")
            return _add(y[: x.shape[0]].float(), addend)

        return multiply_tiles
    if not uses_fbgemm:
        rounded = weight.bfloat16()
        return lambda x, addend: _add(F.linear(x.bfloat16(), rounded).float(), addend)
    # FBGEMM stores float16, which represents every bfloat16 from 2**-14 to 2**15 exactly.
    packed = torch.ops.quantized.linear_prepack_fp16(weight.bfloat16().float(), None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return lambda x, addend: _add(multiply(x, packed), addend)


def _fill_tiles(x: Tensor) -> Tensor:
    """Append rows of zeros, because oneDNN compiles a product for each new number of rows."""
    num_rows = x.shape[0]
    return x if num_rows <= FEW_ROWS else F.pad(x, (0, 0, 0, -num_rows % ROWS_STEP))


def _add(y: Tensor, addend: Tensor | None) -> Tensor:
    return y if addend is None else y.add_(addend)


def _pack_int8(weight: Tensor, scale: Tensor) -> Product:
    if weight.numel() < NARROW_FROM or not has_fbgemm():
        return _Float32Product(weight * scale.unsqueeze(1))
    return _Int8Product(weight, scale)


class _Int8Product:
    """A product in int8, computed by oneDNN or FBGEMM.

    oneDNN is used if the processor has tiles and there is more than one row. Both libraries
    multiply the same integers and add up the products exactly.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._weight, self._scale = weight, scale
        self._levels = activation_levels()
        self._tiled: Tensor | None = None
        self._packed: object = None

    def __call__(self, x: Tensor, addend: Tensor | None) -> Tensor:
        levels = x.abs()
        step = levels.amax(dim=1, keepdim=True).clamp_(min=SMALLEST_SCALE).div_(self._levels)
        torch.mul(x, step.reciprocal(), out=levels).round_()
        fills_tiles = has_tiles() and x.shape[0] > 1
        y = self._multiply_tiles(levels) if fills_tiles else self._multiply(levels)
        return y.mul_(step) if addend is None else torch.addcmul(addend, y, step)

    def _multiply_tiles(self, levels: Tensor) -> Tensor:
        if self._tiled is None:
            self._zeros = torch.zeros(len(self._scale), dtype=torch.int64)
            self._tiled = torch.ops.onednn.qlinear_prepack(self._weight, None)
        arguments = self._tiled, self._scale, self._zeros, None, 1.0, 0, torch.float32
        filled = _fill_tiles(levels.to(torch.int8))
        y = _onednn_int8(filled, 1.0, 0, *arguments, "none", [], "")
        return y[: levels.shape[0]]

    def _multiply(self, levels: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = _fbgemm_pack(self._weight, self._scale)
        return _fbgemm_multiply(levels, 1.0, self._levels + 1, self._packed)


_onednn_int8 = torch.ops.onednn.qlinear_pointwise
# This operator rounds its input to integers, multiplies in int8, adds up in int32, and scales the
# sums back to float32.
_fbgemm_multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


def _fbgemm_pack(weight: Tensor, scale: Tensor) -> object:
    with warnings.catch_warnings(), _engine_lock:
        warnings.filterwarnings("ignore", "torch.quantize|.*quantized", UserWarning)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            zero_points = torch.zeros(len(scale), dtype=torch.int64)
            quantised = torch._make_per_channel_quantized_tensor(weight, scale, zero_points, 0)
            return torch.ops.quantized.linear_prepack(quantised, None)
        finally:
            torch.backends.quantized.engine = engine
