"""The matrix products that a training step of the translation model cannot do without.

What stays out: everything that is no product (activations, softmaxes, embeddings, dropout, sorting,
the optimizer), and every product that need not be done: the weight gradient of a recurrent layer
is one product over all steps here, and padding is no token. Experts get equal numbers of rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nmt_moe.nn import GNMTConfig


@dataclass(frozen=True)
class Product:
    """One product of the forward pass, (rows, inner) @ (inner, cols), with its two of the backward.

    Attributes:
        group: What it belongs to, for totals.
        rows: Of one call.
        inner: The dimension summed over.
        cols: Of the result.
        steps: Calls that wait for one another and share the right-hand matrix. Forward and the
            left-hand gradient take this many calls, the right-hand gradient one over all rows.
        matrices: Right-hand matrices, each with `rows` of its own (experts): a call for each.
        batch: Right-hand matrices, each with `rows` of its own (sentences): one call for all.
    """

    group: str
    rows: int
    inner: int
    cols: int
    steps: int = 1
    matrices: int = 1
    batch: int = 1

    @property
    def flops(self) -> int:
        """Operations of the forward pass; a multiplication and an addition are two."""
        calls = self.steps * self.matrices * self.batch
        return 2 * calls * self.rows * self.inner * self.cols


@dataclass(frozen=True)
class Batch:
    """The sizes of one training step: no sentence has padding.

    Attributes:
        sentences: B.
        source_length: S.
        target_length: T.
        vocab_size: V.
    """

    sentences: int
    source_length: int
    target_length: int
    vocab_size: int


def training_flops(products: Iterable[Product]) -> int:
    """Operations of forward and backward pass: each product once, and its two gradients."""
    return 3 * sum(product.flops for product in products)


def flops_by_group(products: Iterable[Product]) -> dict[str, int]:
    """Operations of forward and backward pass, for each group."""
    totals: dict[str, int] = defaultdict(int)
    for product in products:
        totals[product.group] += training_flops([product])
    return dict(totals)


def model_products(config: GNMTConfig, batch: Batch) -> list[Product]:
    """List the products of one forward pass of encoder, decoder and softmax layer, in order."""
    return [
        *_encoder_products(config, batch),
        *_decoder_products(config, batch),
        Product(
            "softmax", batch.sentences * batch.target_length, config.model_dim, batch.vocab_size
        ),
    ]


def _encoder_products(config: GNMTConfig, batch: Batch) -> Iterator[Product]:
    dim, length, sentences = config.model_dim, batch.source_length, batch.sentences
    for _ in range(2):  # the bidirectional pair
        yield from _lstm_products(config, length, sentences, dim)
    yield from _moe_products(config, sentences * length)
    for _ in range(config.encoder_layers - 2):
        yield from _lstm_products(config, length, sentences, dim)
    yield Product("attention", sentences * length, dim, dim)  # keys


def _decoder_products(config: GNMTConfig, batch: Batch) -> Iterator[Product]:
    dim, length, sentences = config.model_dim, batch.target_length, batch.sentences
    is_recurrent = config.attention_wiring == "recurrent"
    if is_recurrent:
        yield from _lstm_products(config, length, sentences, dim, recurrent_dim=2 * dim)
        yield from _attention_products(config, batch, rows=1, steps=length)
    else:
        yield from _lstm_products(config, length, sentences, dim)
        yield from _attention_products(config, batch, rows=length, steps=1)
    yield from _moe_products(config, sentences * length)
    for at in range(config.decoder_layers - 1):
        takes_context = at == 0 and not is_recurrent
        yield from _lstm_products(config, length, sentences, 2 * dim if takes_context else dim)


def _lstm_products(
    config: GNMTConfig,
    length: int,
    sentences: int,
    input_dim: int,
    recurrent_dim: int | None = None,
) -> Iterator[Product]:
    """Yield the products of one LSTM with projection: the input's at once, the others by step.

    `recurrent_dim` is the width of what the step before hands over, if it is more than its output.
    """
    dim, hidden_dim = config.model_dim, config.lstm_hidden_dim
    recurrent_dim = recurrent_dim or dim
    yield Product("LSTM input", length * sentences, input_dim, 4 * hidden_dim)
    yield Product("LSTM recurrent", sentences, recurrent_dim, 4 * hidden_dim, steps=length)
    if hidden_dim != dim:
        yield Product("LSTM projection", sentences, hidden_dim, dim, steps=length)


def _attention_products(
    config: GNMTConfig, batch: Batch, rows: int, steps: int
) -> Iterator[Product]:
    dim, sentences, source = config.model_dim, batch.sentences, batch.source_length
    yield Product("attention", rows * sentences, dim, dim, steps=steps)  # query
    if config.attention == "product":
        yield Product("attention", rows, dim, source, steps=steps, batch=sentences)  # scores
    else:
        yield Product("attention", rows * sentences * source, dim, 1, steps=steps)
    yield Product("attention", rows, source, dim, steps=steps, batch=sentences)  # context


def _moe_products(config: GNMTConfig, tokens: int) -> Iterator[Product]:
    if config.moe is None:
        return
    moe, dim = config.moe, config.model_dim
    yield Product("MoE gate", tokens, dim, moe.num_experts)
    yield Product("MoE gate", tokens, dim, moe.num_experts)  # noise
    # One row at least, so that a tiny batch has products too.
    rows = max(1, tokens * moe.top_k // moe.num_experts)
    yield Product("MoE experts", rows, dim, moe.hidden_dim, matrices=moe.num_experts)
    yield Product("MoE experts", rows, moe.hidden_dim, dim, matrices=moe.num_experts)


class Pool:
    """Tensors by use and shape, shared by lists of products that never run at the same time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.tensors: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self.scratch = torch.empty(0, device=device)

    def take(self, shape: tuple[int, ...], at: int) -> Tensor:
        """Return the tensor number `at` of a shape."""
        while len(self.tensors[shape]) <= at:
            self.tensors[shape].append(torch.rand(shape, device=self.device) - 0.5)
        return self.tensors[shape][at]

    def reserve(self, size: int) -> None:
        """Make the scratch for results hold `size` numbers."""
        if self.scratch.numel() < size:
            self.scratch = torch.zeros(size, device=self.device).add_(1.0)  # really there


class BareProducts:
    """Run a list of products forward, and their two gradients backward, and nothing else.

    Every product has operands of its own, as in a model; results go to one scratch.
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
            many, rows = (product.matrices, product.batch), product.steps * product.rows
            left = take(*many, rows, product.inner)
            right = take(*many, product.inner, product.cols)
            grad = take(*many, rows, product.cols)
            pool.reserve(max(tensor[0].numel() for tensor in (left, right, grad)))
            self.operands.append((left, right, grad))

    @torch.no_grad()
    def __call__(self) -> None:
        """Run all of them once."""
        for product, (left, right, _) in zip(self.products, self.operands, strict=True):
            for matrix in range(product.matrices):
                self._by_step(product, left[matrix], right[matrix])
        backwards = list(zip(self.products, self.operands, strict=True))[::-1]
        for product, (left, right, grad) in backwards:
            for matrix in range(product.matrices):
                self._multiply(left[matrix].transpose(1, 2), grad[matrix])
                self._by_step(product, grad[matrix], right[matrix].transpose(1, 2))

    def _by_step(self, product: Product, left: Tensor, right: Tensor) -> None:
        for rows in left.split(product.rows, dim=1):
            self._multiply(rows, right)

    def _multiply(self, left: Tensor, right: Tensor) -> None:
        shape = left.shape[0], left.shape[1], right.shape[2]
        out = self.pool.scratch[: shape[0] * shape[1] * shape[2]].view(shape)
        if len(left) == 1:
            torch.mm(left[0], right[0], out=out[0])
        else:
            torch.bmm(left, right, out=out)
