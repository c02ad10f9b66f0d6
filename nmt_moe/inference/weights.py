"""Map the weights of a bundle from its files, and check them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nmt_moe.inference.bundle import EXPORT_AGAIN, WEIGHTS, BundleConfig, check_file
from nmt_moe.kernels import PackedExperts, PackedLinear
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig, GNMTDecoder, GNMTEncoder, LSTMLanguageModel

SCALE = ".scale"
# Names of the experts' matrices, which are stored with one row for each output.
EXPERTS_IN, EXPERTS_OUT = "weight_in", "weight_out"
DIGEST = "sha256"
# Part of the names of weights that are used only during training.
UNUSED = "noise_weight"
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def experts_file(side: str) -> str:
    """Return the name of the file with the encoder's or decoder's experts."""
    return f"experts.{side}.safetensors"


def is_product(name: str, value: Tensor) -> bool:
    """Return whether a weight is used in matrix products, and is thus stored in the bundle's dtype.

    Gates are stored in float32, because a rounded gate may choose other experts.
    """
    return value.dim() > 1 and ".gate." not in name


def expected_shapes(config: BundleConfig, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all weights in the networks except the experts' weights.

    Args:
        config: Configuration of the bundle.
        sizes: Number of rows of the embeddings, "encoder" and "decoder", and of "output".
    """
    network: Any = config.network
    with torch.device("meta"):
        if isinstance(network, GNMTConfig):
            modules: dict[str, nn.Module] = {
                "encoder": GNMTEncoder(network, _embedding(sizes["encoder"], network.model_dim)),
                "decoder": GNMTDecoder(network, _embedding(sizes["decoder"], network.model_dim)),
            }
        else:
            embedding = _embedding(sizes["decoder"], network.model_dim)
            modules = {"decoder": LSTMLanguageModel(network, embedding)}
    shapes = {
        f"{side}.{name}": tuple(value.shape)
        for side, module in modules.items()
        for name, value in module.state_dict().items()
        if UNUSED not in name and ".experts." not in name
    }
    shapes["decoder.output.weight"] = (sizes["output"], network.model_dim)
    return shapes


def _embedding(size: int, dim: int) -> nn.Embedding:
    # Initialising weights on the meta device would import torch's compiler, which takes seconds.
    return nn.Embedding(size, dim, _weight=torch.empty(size, dim))


class Weights:
    """The weights of a bundle except its experts, checked against its configuration.

    Args:
        folder: Folder of the bundle.
        config: Configuration of the bundle.
        sizes: Number of rows of the embeddings, "encoder" and "decoder", and of "output". If
            "output" is missing, its size is read from the file.
        sums: The SHA-256 hash of each file.

    Raises:
        ValueError: if the file was changed or a weight does not fit; the message says which.
    """

    def __init__(
        self, folder: Path, config: BundleConfig, sizes: dict[str, int], sums: dict[str, str]
    ) -> None:
        self.path, self.config = folder / WEIGHTS, config
        check_file(folder, WEIGHTS, sums)
        self._tensors = map_file(self.path)
        self._check_claims()
        self._check(sizes)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.config.shared_weights.get(name, name)]

    def __contains__(self, name: str) -> bool:
        return self.config.shared_weights.get(name, name) in self._tensors

    def linear(self, name: str, bias: Tensor | None = None) -> PackedLinear:
        """Return the matrix product with a weight (O, I)."""
        weight = self[name]
        if weight.dtype == torch.int8:
            return PackedLinear.from_int8(weight, self[self._scale_of(name)], bias)
        return PackedLinear.pack(weight, bias, self.config.dtype)

    def embedding(self, name: str) -> Embedding:
        """Return the embedding with a table (V, D)."""
        weight = self[name]
        is_int8 = weight.dtype == torch.int8
        return Embedding(weight, self[self._scale_of(name)] if is_int8 else None)

    def _scale_of(self, name: str) -> str:
        return self.config.shared_weights.get(name, name) + SCALE

    def _check_claims(self) -> None:
        """Reject sizes that need more weights than the file has, before building anything."""
        network: Any = self.config.network
        for name in ("encoder_layers", "decoder_layers", "lstm_layers", "expert_layers"):
            if getattr(network, name, 0) > len(self._tensors):
                self._reject(f"it has {len(self._tensors)} weights, fewer than its `{name}`")
        gates = sum(value.numel() for name, value in self._tensors.items() if ".gate." in name)
        if network.moe is not None and network.moe.num_experts > max(gates, 1):
            self._reject(f"it has no gates for {network.moe.num_experts} experts")

    def _check(self, sizes: dict[str, int]) -> None:
        output = "decoder.output.weight"
        if output not in self or self[output].dim() != 2:
            self._reject(f"`{output}` is missing or is not a matrix")
        have = {name: tuple(value.shape) for name, value in self._tensors.items()}
        want = expected_shapes(self.config, {"output": len(self[output]), **sizes})
        for name, shape in want.items():
            stored = self.config.shared_weights.get(name, name)
            if stored not in have:
                self._reject(f"`{stored}` is missing")
            if have[stored] != shape:
                self._reject(f"`{stored}` must be {shape}, but is {have[stored]}")
            value = self._tensors[stored]
            dtype = STORED[self.config.dtype] if is_product(stored, value) else torch.float32
            if value.dtype != dtype:
                self._reject(f"`{stored}` must be {dtype}, but is {value.dtype}")
            if dtype == torch.int8 and have.get(stored + SCALE) != shape[:1]:
                scale = stored + SCALE
                self._reject(f"`{scale}` must be {shape[:1]}, but is {have.get(scale)}")
        known = {self.config.shared_weights.get(name, name) for name in want}
        unknown = have.keys() - known - {name + SCALE for name in known}
        if unknown:
            self._reject(f"`{min(unknown)}` is not one of its weights")

    def _reject(self, fault: str) -> None:
        raise ValueError(f"`{self.path}` does not fit its configuration: {fault}. {EXPORT_AGAIN}")


class Embedding:
    """A table (V, D) of float32 rows, which may be stored in bfloat16 or int8."""

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        self.weight, self.scale = weight, scale

    def __len__(self) -> int:
        return len(self.weight)

    def __call__(self, numbers: Tensor) -> Tensor:
        """Return (..., D) float32 rows for (...) int64 indices."""
        rows = self.weight[numbers].float()
        return rows if self.scale is None else rows * self.scale[numbers].unsqueeze(-1)


class ExpertWeights:
    """The experts of one layer, mapped from their file. Each is checked before its first use.

    Attributes:
        weight_in: (E, H, D), the experts' first matrices, packed one expert at a time.
        weight_out: (E, D, H), the experts' second matrices, packed in the same way.

    Raises:
        ValueError: if the file is missing, or its contents do not fit the configuration.
    """

    def __init__(self, folder: Path, side: str, moe: MoEConfig, dtype: str) -> None:
        self.path, self.dtype, self.num_experts = (
            folder / experts_file(side),
            dtype,
            moe.num_experts,
        )
        if not self.path.is_file():
            raise ValueError(f"`{folder}` has no `{self.path.name}`. {EXPORT_AGAIN}")
        self._tensors = map_file(self.path)
        sizes = moe.num_experts, moe.hidden_dim, moe.model_dim
        shape_out = sizes[0], sizes[2], sizes[1]
        want: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            EXPERTS_IN: (sizes, STORED[dtype]),
            EXPERTS_OUT: (shape_out, STORED[dtype]),
            DIGEST: ((sizes[0], 32), torch.uint8),
        }
        if dtype == "int8":
            want[EXPERTS_IN + SCALE] = sizes[:2], torch.float32
            want[EXPERTS_OUT + SCALE] = shape_out[:2], torch.float32
        have = {name: (tuple(value.shape), value.dtype) for name, value in self._tensors.items()}
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise ValueError(
                    f"`{self.path}` does not contain the experts of its configuration: "
                    f"`{name[:80]}` is {have.get(name)}, not {want.get(name)}. {EXPORT_AGAIN}"
                )
        # An expert's digest is checked only with its first matrix, which is always used first.
        self.weight_in = self._experts(EXPERTS_IN, self.check)
        self.weight_out = self._experts(EXPERTS_OUT, None)

    def check(self, expert: int) -> None:
        """Compare an expert with its digest.

        Raises:
            ValueError: if its weights were changed.
        """
        digest = expert_digest(expert, self._tensors)
        if digest != bytes(self._tensors[DIGEST][expert].tolist()):
            raise ValueError(f"`{self.path}`: expert {expert} was altered. {EXPORT_AGAIN}")

    def _experts(self, name: str, check: Callable[[int], None] | None) -> PackedExperts:
        weight = self._tensors[name]
        if weight.dtype == torch.int8:
            return PackedExperts.from_int8(weight, self._tensors[name + SCALE], check)
        return PackedExperts.pack(weight, self.dtype, check)


def expert_digest(expert: int, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the SHA-256 hash of one expert's weights and scales, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - {DIGEST}):
        digest.update(tensors[name][expert].contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def map_file(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file, reading only its header.

    Raises:
        ValueError: if the file is truncated or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"`{path}` is not a complete safetensors file: {error}. {EXPORT_AGAIN}"
        ) from None
