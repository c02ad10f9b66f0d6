"""The costs of one architecture, as the paper counts them."""

from __future__ import annotations

from dataclasses import dataclass

from nmt_moe.nn import GNMTConfig
from nmt_moe.planning.architectures import NetworkConfig
from nmt_moe.planning.batch import Batch
from nmt_moe.planning.network import describe

BYTES = 4
# Parts that the paper counts; attention, embedding and a language model's softmax are left out.
COUNTED = ("LSTM", "gates", "experts")


@dataclass(frozen=True)
class Card:
    """The costs of one architecture; memory in bytes, all in float32.

    Attributes:
        architecture: Name of the architecture.
        vocab_size: Size of the vocabulary, V.
        ops: Multiply-adds of the forward pass for a token: LSTMs with their projections, both
            matrices of each gate that is evaluated, the experts a token goes to; in a translation
            model (for a source and a target token) also the softmax.
        params: The weights of LSTMs, gates and experts, and one bias for each gate of an LSTM.
        active: The part of `params` that one token uses.
        total: All numbers that torch stores.
        parts: Multiply-adds of each part, including those left out of `ops`.
        weights_bytes: Memory of the weights.
        gradients_bytes: Memory of the gradients.
        adam_bytes: Memory of both moments of Adam.
        factored_adam_bytes: Memory of factored Adam, which keeps a row and a column of each expert
            matrix.

    Source: Shazeer et al. 2017, sections 5.1-5.4, Tables 7 and 8, Appendix D.
    """

    architecture: str
    vocab_size: int
    ops: int
    params: int
    active: int
    total: int
    parts: dict[str, int]
    weights_bytes: int
    gradients_bytes: int
    adam_bytes: int
    factored_adam_bytes: int


def make_card(architecture: str, config: NetworkConfig, vocab_size: int) -> Card:
    """Count the costs of a network, without allocating it."""
    network = describe(config, Batch(1, 1, vocab_size))
    parts: dict[str, int] = {}
    for product in network.products:
        if product.weight:
            parts[product.part] = parts.get(product.part, 0) + product.macs
    counted = [weight for weight in network.weights if weight.part in COUNTED]
    # torch's LSTM has a second, redundant bias.
    biases = sum(weight.size for weight in counted if "bias_ih" in weight.name)
    ops = sum(parts.get(part, 0) for part in COUNTED)
    total = sum(weight.size for weight in network.weights) + 2 * parts["softmax"]
    experts = [weight for weight in network.weights if weight.is_expert]
    dense = total - sum(weight.size for weight in experts)
    return Card(
        architecture=architecture,
        vocab_size=vocab_size,
        ops=ops + (parts["softmax"] if isinstance(config, GNMTConfig) else 0),
        params=sum(weight.size for weight in counted if weight.is_matrix) + biases,
        active=ops + biases,
        total=total,
        parts=parts,
        weights_bytes=BYTES * total,
        gradients_bytes=BYTES * total,
        adam_bytes=BYTES * 2 * total,
        factored_adam_bytes=BYTES * (sum(w.factored_size for w in experts) + 2 * dense),
    )
