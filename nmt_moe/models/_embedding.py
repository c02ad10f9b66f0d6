"""Build the embedding of a dictionary."""

from fairseq.data import Dictionary
from torch import nn


def build_embedding(dictionary: Dictionary, model_dim: int, init_range: float) -> nn.Embedding:
    """Return the embedding of a dictionary's V symbols, with width `model_dim`.

    Weights are drawn uniformly from [-init_range, init_range]; the row of the padding symbol is 0.
    """
    embedding = nn.Embedding(len(dictionary), model_dim, dictionary.pad())
    nn.init.uniform_(embedding.weight, -init_range, init_range)
    nn.init.zeros_(embedding.weight[dictionary.pad()].data)
    return embedding
