"""The matrix products that a training step of the translation model requires.

The products come from the planner's description of the network. Other operations (activations,
softmaxes, embeddings, dropout, sorting, the optimizer) are not included, and neither are products
that could be avoided. The weight gradient of a recurrent layer is therefore a single product over
all steps, and padding does not count as tokens.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from nmt_moe.nn import GNMTConfig
from nmt_moe.planning import Batch, Product, describe

# The input that an LSTM's weight multiplies, by a part of the weight's name.
LSTM_PARTS = {"_ih_": "input", "weight_x": "input", "_hh_": "recurrent", "recurrent": "recurrent"}
GROUPS = {"gates": "MoE gate", "experts": "MoE experts"}


def model_products(config: GNMTConfig, batch: Batch) -> list[Product]:
    """List the products of a forward pass through encoder, decoder and softmax layer, in order.

    Every expert gets the same number of rows, at least one, so that even a tiny batch has expert
    products.
    """
    return [
        product
        if product.experts == 1
        else replace(product, rows=max(product.rows // product.experts, 1) * product.experts)
        for product in describe(config, batch).products
    ]


def group_of(product: Product) -> str:
    """Return the name of a product's group, for totals."""
    if product.part != "LSTM":
        return GROUPS.get(product.part, product.part)
    kinds = [kind for name, kind in LSTM_PARTS.items() if name in product.weight]
    return f"LSTM {kinds[0] if kinds else 'projection'}"


def training_flops(products: Iterable[Product]) -> int:
    """Count the operations of the forward and backward passes: each product and its two gradients.

    A multiplication and an addition count as two operations.
    """
    return 6 * sum(product.macs for product in products)


def flops_by_group(products: Iterable[Product]) -> dict[str, int]:
    """Count the operations of the forward and backward passes by group."""
    totals: dict[str, int] = defaultdict(int)
    for product in products:
        totals[group_of(product)] += training_flops([product])
    return dict(totals)


class Pool:
    """Tensors by shape, shared by lists of products that never run at the same time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.tensors: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self.scratch = torch.empty(0, device=device)

    def take(self, shape: tuple[int, ...], index: int) -> Tensor:
        """Return tensor number `index` of a shape."""
        while len(self.tensors[shape]) <= index:
            self.tensors[shape].append(torch.rand(shape, device=self.device) - 0.5)
        return self.tensors[shape][index]

    def reserve(self, size: int) -> None:
        """Enlarge the scratch buffer for results to at least `size` numbers."""
        if self.scratch.numel() < size:
            self.scratch = torch.zeros(size, device=self.device).add_(
                1.0
            )  # so that the memory is really allocated


class BareProducts:
    """A job that computes products, then their two gradients in reverse order, and nothing else.

    Every product has its own operands, as in a model; all results share one scratch buffer.
    """

    def __init__(self, products: Iterable[Product], pool: Pool) -> None:
        self.products = list(products)
        self.pool = pool
        taken: dict[tuple[int, ...], int] = defaultdict(int)

        def take(*shape: int) -> Tensor:
            taken[shape] += 1
            return pool.take(shape, taken[shape] - 1)

        self.operands = []
        for product in self.products:
            many = product.experts, product.batch
            rows = product.steps * product.rows // product.experts
            left = take(*many, rows, product.inner)
            right = take(*many, product.inner, product.cols)
            grad = take(*many, rows, product.cols)
            pool.reserve(max(tensor[0].numel() for tensor in (left, right, grad)))
            self.operands.append((left, right, grad))

    @torch.no_grad()
    def __call__(self) -> None:
        """Run all products and their gradients once."""
        for product, (left, right, _) in zip(self.products, self.operands, strict=True):
            for matrix in range(product.experts):
                self._by_step(product, left[matrix], right[matrix])
        backwards = list(zip(self.products, self.operands, strict=True))[::-1]
        for product, (left, right, grad) in backwards:
            for matrix in range(product.experts):
                self._multiply(left[matrix].transpose(1, 2), grad[matrix])
                self._by_step(product, grad[matrix], right[matrix].transpose(1, 2))

    def _by_step(self, product: Product, left: Tensor, right: Tensor) -> None:
        for rows in left.split(product.rows // product.experts, dim=1):
            self._multiply(rows, right)

    def _multiply(self, left: Tensor, right: Tensor) -> None:
        shape = left.shape[0], left.shape[1], right.shape[2]
        out = self.pool.scratch[: shape[0] * shape[1] * shape[2]].view(shape)
        if len(left) == 1:
            torch.mm(left[0], right[0], out=out[0])
        else:
            torch.bmm(left, right, out=out)
