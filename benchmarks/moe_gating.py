"""The gate's arithmetic on logits, fused and in torch, and a copy of the same number of bytes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.moe_points import Point
from nmt_moe import kernels

# A function from logits and raw noise scales, both (N, E), to gates (N, K), importance (E,) and
# load (E,).
Gating = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def eager_gating(clean: Tensor, raw_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gates step by step, as in the paper.

    Source: Shazeer et al. 2017, eqs. 3-6 and 8-10.
    """
    scale = F.softplus(raw_scale) + 1e-2
    noisy = clean + torch.randn_like(clean) * scale
    top, top_ids = noisy.topk(top_k + 1, dim=1)
    gates = top[:, :top_k].softmax(1)
    dense = torch.zeros_like(clean).scatter(1, top_ids[:, :top_k], gates)
    if_in, if_out = top[:, top_k, None], top[:, top_k - 1, None]
    threshold = torch.where(noisy > if_in, if_in, if_out)
    return gates, dense.sum(0), torch.special.ndtr((clean - threshold) / scale).sum(0)


def fused_gating(clean: Tensor, raw_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gates as nmt_moe does."""
    found = kernels.noisy_top_k(clean, raw_scale, top_k)
    return found.gates, found.importance, found.load


GATINGS: dict[str, Gating] = {"eager_gating": eager_gating, "fused_gating": fused_gating}
NAMES = (*GATINGS, "copy")


class GatingRun:
    """A forward and backward pass from logits (N, E); "copy" only moves the same number of bytes.

    The forward pass reads two (N, E) tensors; the backward pass reads two and writes two.
    """

    def __init__(self, name: str, point: Point, device: str) -> None:
        self.gating = GATINGS.get(name)
        self.top_k = point.top_k
        dtype = getattr(torch, point.dtype)
        shape = point.tokens, point.num_experts
        torch.manual_seed(0)
        if self.gating is None:
            self.source = torch.zeros(3, *shape, dtype=dtype, device=device)
            self.target = torch.zeros_like(self.source)
            return
        self.logits = [torch.randn(shape, dtype=dtype, device=device) for _ in range(2)]
        for tensor in self.logits:
            tensor.requires_grad_()

    def run(self, mode: str) -> None:
        """Run both passes, or the copy, once."""
        assert mode == "fwd+bwd", mode
        if self.gating is None:
            self.target.copy_(self.source)
            return
        self.rest()
        clean, raw_scale = self.logits
        gates, importance, load = self.gating(clean, raw_scale, self.top_k)
        grads = [torch.ones_like(tensor) for tensor in (gates, importance, load)]
        torch.autograd.backward([gates, importance, load], grads)

    def describe(self) -> dict[str, Any]:
        """Return the facts that the tables show."""
        return {"notes": "" if self.gating else "a copy of the same number of bytes"}

    def rest(self) -> None:
        """Free the memory that is needed only during a run."""
        if self.gating is not None:
            for tensor in self.logits:
                tensor.grad = None

    def dropped(self) -> None:
        """Return None, because nothing is dispatched."""
