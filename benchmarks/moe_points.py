"""The sizes at which MoE layers are measured, by name."""

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nmt_moe.moe import MoEConfig

# "step" includes the optimizer; "gate" is the forward and backward pass of the gate and both
# balance losses, without experts.
MODES = ("forward", "fwd+bwd", "gate", "step")
TRAINING = ("forward", "fwd+bwd", "step")
# The bare matrix products are also measured in these modes.
BARE = ("forward", "fwd+bwd")


@dataclass(frozen=True)
class Point:
    """One size of layer and batch to measure.

    Attributes:
        tokens: Tokens in the batch, N.
        model_dim: Width of tokens, D.
        hidden_dim: Hidden width of an expert, H.
        num_experts: Number of experts, E.
        top_k: Experts per token, K.
        num_groups: Groups of the hierarchical layer, G; each token uses sqrt(K) groups, and
            sqrt(K) experts in each. 0 if there is no such layer.
        modes: The modes to time, a subset of `MODES`.
        dtype: Type of tokens and weights, by its name in torch.
        kind: Kind of measurement: "layer", or "gating" for only the gate's arithmetic on logits.
        yardsticks: Competitors that always run at this point, even if not requested.
    """

    tokens: int
    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    num_groups: int = 0
    modes: tuple[str, ...] = TRAINING
    dtype: str = "float32"
    kind: str = "layer"
    yardsticks: tuple[str, ...] = ()

    def __str__(self) -> str:
        letters = {"N": self.tokens, "D": self.model_dim, "H": self.hidden_dim}
        letters |= {"E": self.num_experts, "K": self.top_k}
        if self.kind == "gating":
            del letters["D"], letters["H"]
        if self.num_groups:
            letters["G"] = self.num_groups
        return " ".join(f"{name}={value}" for name, value in letters.items()) + f" {self.dtype}"

    @property
    def rows_per_expert(self) -> float:
        """Return the mean number of tokens per expert."""
        return self.tokens * self.top_k / self.num_experts

    def flops(self) -> int:
        """Return the number of operations in the experts' two products in the forward pass."""
        return 4 * self.tokens * self.top_k * self.model_dim * self.hidden_dim

    def config(self, hierarchical: bool = False) -> MoEConfig:
        """Describe nmt_moe's layer of this size."""
        return MoEConfig(
            model_dim=self.model_dim,
            hidden_dim=self.hidden_dim,
            num_experts=self.num_experts,
            top_k=math.isqrt(self.top_k) if hierarchical else self.top_k,
            num_groups=self.num_groups if hierarchical else 0,
        )

    def smaller(self) -> "Point":
        """Return a tiny point of the same kind, to be run first so that loading is not measured."""
        sizes = {"tokens": 32, "model_dim": 32, "hidden_dim": 48, "num_experts": 8}
        groups = 4 if self.num_groups else 0
        return dataclasses.replace(self, **sizes, top_k=min(self.top_k, 4), num_groups=groups)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Point":
        """Restore a point from the JSON of its `dataclasses.asdict`."""
        tuples = {name: tuple(fields[name]) for name in ("modes", "yardsticks")}
        return cls(**{**fields, **tuples})


def parse_shape(text: str) -> Point:
    """Parse "T,d,h,n,k" or "T,d,h,n,k,groups".

    Raises:
        argparse.ArgumentTypeError: if the numbers do not describe a valid layer.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (5, 6):
        raise argparse.ArgumentTypeError(
            f"must be five or six whole numbers T,d,h,n,k[,groups], but is {text!r}. "
            "For example: 4096,512,1024,32,4."
        )
    point = Point(*numbers)
    try:
        if point.tokens < 1:
            raise ValueError(f"T must be at least 1, but is {point.tokens}.")
        point.config()
        if point.num_groups:
            if math.isqrt(point.top_k) ** 2 != point.top_k:
                raise ValueError(
                    f"with groups, k must be a square number, but is {point.top_k}: each of "
                    "sqrt(k) groups provides sqrt(k) experts. Use 1, 4 or 16."
                )
            point.config(hierarchical=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return point


def _language_model(experts: int, hidden: int) -> Point:
    return Point(4096, 512, hidden, experts, 4)


def _decoding_step(tokens: int) -> Point:
    return Point(tokens, 512, 2048, 32, 4, modes=BARE)


def _on_gpu(tokens: int, experts: int) -> Point:
    plain = ("torch_grouped_mm", "torch_loop")
    return Point(tokens, 512, 1024, experts, 4, modes=BARE, dtype="bfloat16", yardsticks=plain)


# 4096 experts with their gradients and Adam's two moments must fit into about 20 GB.
_FOUR_THOUSAND = Point(4096, 512, 256, 4096, 4, num_groups=64)

GRIDS: dict[str, list[Point]] = {
    # Shazeer et al. 2017: MoE-4, -32, -256 and -1024 language models; translation.
    "paper": [
        _language_model(4, 1024),
        _language_model(32, 1024),
        _language_model(32, 2048),
        _language_model(256, 1024),
        _language_model(1024, 1024),
    ],
    "decode": [_decoding_step(64)],
    "hierarchical": [_FOUR_THOUSAND],
    "scaling": [
        Point(4096, 512, 256, experts, 4, modes=("fwd+bwd", "gate", "step"))
        for experts in (4, 16, 64, 256, 1024, 4096)
    ],
    "gpu": [
        *(
            Point(65536, 1, 1, experts, 4, modes=("fwd+bwd",), kind="gating")
            for experts in (256, 1024, 4096)
        ),
        _on_gpu(4096, 32),  # 512 tokens per expert
        _on_gpu(16384, 32),  # 2048 tokens per expert
        _on_gpu(2048, 512),  # 16 tokens per expert
        _on_gpu(512, 512),  # 4 tokens per expert
        _on_gpu(4096, 1024),  # 16 tokens per expert, and more experts than grouped_mm accepts
        # In bfloat16, Adam's moments for 4.3e9 parameters fit into 80 GB.
        Point(16384, 512, 1024, 4096, 4, modes=("step",), dtype="bfloat16"),
    ],
    "smoke": [Point(128, 32, 48, 8, 4, num_groups=4)],
}
