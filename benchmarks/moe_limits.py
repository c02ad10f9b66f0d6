"""The bare matrix products of an MoE layer: a lower limit for the time of its experts in torch."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.moe_points import Point

LIMITS = {
    "gemm": "as many operations as the experts, in dense products over all k T rows",
    "bmm": "as many operations as the experts, over n weight matrices with equal numbers of rows",
}
# Matrices are filled by repeating a block of this many numbers, a prime so that experts differ.
_BLOCK = 1_000_003


class BareProducts:
    """Two forward and four backward products that write to preallocated memory."""

    def __init__(self, kind: str, point: Point, device: str) -> None:
        assert kind in LIMITS, kind
        self.kind = kind
        num_rows = point.tokens * point.top_k
        self.matrices = 1 if kind == "gemm" else point.num_experts
        rows = max(1, num_rows // self.matrices)
        dtype = getattr(torch, point.dtype)
        block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).to(device, dtype)

        def filled(*shape: int) -> Tensor:
            tensor = torch.empty(self.matrices, *shape, dtype=dtype, device=device)
            fill_from(tensor, block, 0)
            return tensor

        self.x, self.y = filled(rows, point.model_dim), filled(rows, point.model_dim)
        self.hidden = filled(rows, point.hidden_dim)
        self.weight_in = filled(point.model_dim, point.hidden_dim).div_(point.model_dim)
        self.weight_out = filled(point.hidden_dim, point.model_dim).div_(point.hidden_dim)
        self.gradients: tuple[Tensor, ...] = ()

    def run(self, mode: str) -> None:
        """Compute the products of "forward" or "fwd+bwd" once."""
        self._multiply(self.x, self.weight_in, self.hidden)
        self._multiply(self.hidden, self.weight_out, self.y)
        if mode == "forward":
            return
        assert mode == "fwd+bwd", mode
        if not self.gradients:
            likes = self.x, self.hidden, self.weight_in, self.weight_out
            self.gradients = tuple(torch.zeros_like(tensor) for tensor in likes)
        grad_x, grad_hidden, grad_in, grad_out = self.gradients
        self._multiply(self.y, self.weight_out.transpose(1, 2), grad_hidden)
        self._multiply(self.hidden.transpose(1, 2), self.y, grad_out)
        self._multiply(grad_hidden, self.weight_in.transpose(1, 2), grad_x)
        self._multiply(self.x.transpose(1, 2), grad_hidden, grad_in)

    def describe(self) -> dict[str, Any]:
        """Return the facts that the tables show."""
        return {"notes": LIMITS[self.kind]}

    def rest(self) -> None:
        """Do nothing, because no memory is needed only during a run."""

    def dropped(self) -> None:
        """Return None, because there are no tokens to drop."""

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        if self.matrices == 1:
            torch.mm(left[0], right[0], out=out[0])
        else:
            torch.bmm(left, right, out=out)


def fill_from(tensor: Tensor, block: Tensor, start: int) -> int:
    """Fill a tensor by repeating a block from its index `start`, and return the next index.

    Drawing billions of random numbers would take longer than measuring.
    """
    flat, end = tensor.view(-1), 0
    while end < len(flat):
        count = min(len(flat) - end, len(block) - start)
        flat[end : end + count].copy_(block[start : start + count])
        end, start = end + count, (start + count) % len(block)
    return start
