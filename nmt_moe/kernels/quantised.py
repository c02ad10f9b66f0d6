"""Products with weights packed for inference: float32, bfloat16 or int8.

int8 is symmetric: a weight's row has one scale, and so has a row of activations, found when it
comes. Rows never share a scale, so what a row gives does not depend on the rows beside it.
"""

import threading
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from nmt_moe.checks import check_choice, check_shape

DTYPES = ("float32", "bfloat16", "int8")
WEIGHT_LEVELS = 127
# FBGEMM needs unsigned activations and a zero point. Without the instructions that add products of
# bytes in 32 bits (VNNI), it adds pairs of them in 16 bits, saturating: 2 * 127 * 127 still fits.
WIDE_LEVELS, NARROW_LEVELS = 127, 63
# Least divisor, so that rows of zeros give no NaN.
SMALLEST_SCALE = 1e-30

# Chosen by `benchmarks/inference_products.py`; its table is in `benchmarks/results/inference.md`.
# From this many weights on, oneDNN's product with weights in its own layout is faster than BLAS for
# more than one row. One row is a vector times a matrix, read fastest when its rows are inputs.
PACKED_FROM = 1 << (22 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 19)
# From this many weights on, reading fewer bytes saves more time than quantising activations or
# rounding them to half precision costs.
NARROW_FROM = 1 << 18
# The number of weights from which this holds for bfloat16 in tiles, whose results come in bfloat16
# and have to be widened.
TILED_FROM = 1 << 20

# Rows of a tile; more rows are filled up to a multiple of the step.
FEW_ROWS, ROWS_STEP = 16, 32

# Maps (R, I) rows and an addend, (O,), (R, O) or None, to (R, O).
Product = Callable[[Tensor, Tensor | None], Tensor]
_engine_lock = threading.Lock()


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 levels, symmetric around zero.

    Args:
        weight: (..., O, I), floating-point: one matrix, or one for each expert.

    Returns:
        (..., O, I) int8 from -127 to 127, and (..., O) float32 scales: their product is the
        nearest to `weight`. A row of zeros has the scale 0.

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
    """y = x W^T + b, with W packed once for the processor at hand, at the first call.

    Attributes:
        shape: Shape of W, (O, I).
        dtype: Type of the weights, "float32", "bfloat16" or "int8"; activations are float32.
    """

    def __init__(
        self, shape: torch.Size, dtype: str, make: Callable[[], Product], bias: Tensor | None
    ) -> None:
        """Use `pack` or `from_int8`."""
        self.shape, self.dtype, self._bias = shape, dtype, bias
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
            dtype: Type in which the matrix is packed, "float32", "bfloat16" or "int8".

        Raises:
            ValueError: if the shapes or the dtype are not these.
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
        """Pack what `quantise_rows` returned.

        Args:
            weight: (O, I) int8, -128 excluded.
            scale: (O,) float32, factor of each row.
            bias: (O,) float32, added to each result.

        Raises:
            ValueError: if the shapes are not these.
        """
        _check_matrix(weight, bias)
        check_shape("scale", scale, (len(weight),), "(O,)")
        return cls(weight.shape, "int8", lambda: _pack_int8(weight, scale), bias)

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Multiply rows by W^T.

        Args:
            x: (..., I) float32 rows.
            addend: (..., O) float32, added to the product; not with a bias.

        Returns:
            (..., O) float32.
        """
        make = self._make  # another thread may be at the same: both make the same
        if make is not None:
            self._product = make()
            self._make = None
        addend = self._bias if addend is None else addend
        if x.dim() == 2:
            return self._product(x, addend)
        if addend is not None and addend.dim() > 1:
            addend = addend.reshape(-1, addend.shape[-1])
        return self._product(x.reshape(-1, x.shape[-1]), addend).view(*x.shape[:-1], -1)


def _check_matrix(weight: Tensor, bias: Tensor | None) -> None:
    check_shape("weight", weight, (None, None), "(O, I)")
    if bias is not None:
        check_shape("bias", bias, (len(weight),), "(O,)")


@cache
def has_fbgemm() -> bool:
    """Return whether torch has FBGEMM, hence int8 and half-precision weights on x86."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@cache
def has_tiles() -> bool:
    """Return whether the processor multiplies tiles of bytes and of bfloat16 (AMX)."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


@cache
def activation_levels() -> int:
    """Return the largest quantised activation with which FBGEMM's sums are exact here."""
    weight = torch.full((8, 64), WEIGHT_LEVELS, dtype=torch.int8)
    packed = _fbgemm_pack(weight, torch.ones(8))
    levels = float(WIDE_LEVELS)
    y = _fbgemm_multiply(torch.full((1, 64), levels), 1.0, WIDE_LEVELS + 1, packed)
    return WIDE_LEVELS if (y == levels * WEIGHT_LEVELS * 64).all() else NARROW_LEVELS


class _Float32Product:
    """BLAS or oneDNN, by the sizes; weights are brought into the layout of each when it comes."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.float()
        self._uses_onednn = weight.numel() >= PACKED_FROM and torch.backends.mkldnn.is_available()
        self._transposed: Tensor | None = None
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor, addend: Tensor | None) -> Tensor:
        if self._uses_onednn and x.shape[0] > 1:
            return self._multiply_packed(x, addend)
        if self._transposed is None:
            self._transposed = self._weight.t().contiguous()
        if addend is None:
            return torch.mm(x, self._transposed)
        return torch.addmm(addend, x, self._transposed)

    def _multiply_packed(self, x: Tensor, addend: Tensor | None) -> Tensor:
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous())
        if addend is None or addend.dim() == 1:
            return _onednn_linear(x, self._packed, addend, "none", [], "")
        return _onednn_linear.binary(x, addend, self._packed, None, "add")


_onednn_linear = torch.ops.mkldnn._linear_pointwise


def _pack_bfloat16(weight: Tensor) -> Product:
    """Keep the weights in 16 bits; activations are rounded as well, but not by FBGEMM."""
    fits_half = weight.abs().amax() <= torch.finfo(torch.float16).max
    uses_fbgemm = has_fbgemm() and not has_tiles()
    narrow_from = TILED_FROM if has_tiles() else NARROW_FROM
    if weight.numel() < narrow_from or (uses_fbgemm and not fits_half):
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
    # FBGEMM's half precision keeps every bit of a bfloat16 from 2**-14 to 2**15.
    packed = torch.ops.quantized.linear_prepack_fp16(weight.bfloat16().float(), None)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return lambda x, addend: _add(multiply(x, packed), addend)


def _fill_tiles(x: Tensor) -> Tensor:
    """Add rows of zeros: oneDNN compiles a product for each number of rows that it meets."""
    num_rows = x.shape[0]
    return x if num_rows <= FEW_ROWS else F.pad(x, (0, 0, 0, -num_rows % ROWS_STEP))


def _add(y: Tensor, addend: Tensor | None) -> Tensor:
    return y if addend is None else y.add_(addend)


def _pack_int8(weight: Tensor, scale: Tensor) -> Product:
    if weight.numel() < NARROW_FROM or not has_fbgemm():
        return _Float32Product(weight * scale.unsqueeze(1))
    return _Int8Product(weight, scale)


class _Int8Product:
    """oneDNN where the processor multiplies tiles and there are rows to fill one, else FBGEMM.

    Both multiply the same integers and add up exactly.
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
# The call rounds x / step to integers, multiplies in int8, adds up in int32, and scales back.
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
