"""Count the costs of an architecture in the same way as the paper."""

from __future__ import annotations

from dataclasses import dataclass

from nmt_moe.nn import GNMTConfig
from nmt_moe.planning.architectures import NetworkConfig
from nmt_moe.planning.batch import Batch
from nmt_moe.planning.network import describe

BYTES = 4
# Parts that the paper counts. It leaves out attention, embeddings and a language model's softmax.
COUNTED = ("LSTM", "gates", "experts")


@dataclass(frozen=True)
class Card:
    """The costs of one architecture. Memory is in bytes, for float32.

    Attributes:
        architecture: Name of the architecture.
        vocab_size: Size of the vocabulary, V.
        ops: Number of multiply-adds in the forward pass for one token. It includes LSTMs with their
            projections, both matrices of each gate that is evaluated, and the experts that the
            token uses. For a translation model, it covers one source token and one target token,
            and includes the softmax.
        params: Number of weights of LSTMs, gates and experts, plus one bias for each gate of an
            LSTM.
        active: Number of these parameters that one token uses.
        total: Total number of values that torch stores.
        parts: Number of multiply-adds of each part, including parts that `ops` leaves out.
        weights_bytes: Memory for the weights.
        gradients_bytes: Memory for the gradients.
        adam_bytes: Memory for both moments of Adam.
        factored_adam_bytes: Memory for the state of factored Adam, which keeps one row and one
            column for each expert matrix.

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
    """Count the costs of a network without allocating memory for it.

    Args:
        architecture: Name of the architecture.
        config: Configuration of the network.
        vocab_size: Size of the vocabulary, V.
    """
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
