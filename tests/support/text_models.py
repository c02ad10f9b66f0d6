"""A tiny language model and its batches, without the commands."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nmt_moe.models.lstm_moe_lm import LSTMMoELM, LSTMMoELMConfig
from tests.support.models import make_dictionary, make_tokens

SMALL = {"model_dim": 8, "lstm_hidden_dim": 8, "init_range": 0.4}


def make_task(words: str = "abcdefghij", num_outputs: int | None = None) -> Any:
    dictionary = make_dictionary(words)
    output = dictionary if num_outputs is None else _Shorter(dictionary, num_outputs)
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=output)


class _Shorter:
    """A dictionary without the last symbols."""

    def __init__(self, dictionary: Any, size: int) -> None:
        self.pad, self.eos, self.size = dictionary.pad, dictionary.eos, size

    def __len__(self) -> int:
        return self.size


def make_model(seed: int = 1, task: Any = None, **options: Any) -> LSTMMoELM:
    """Build a model in evaluation mode, with gates that are not uniform."""
    torch.manual_seed(seed)
    sizes = {**SMALL, "num_experts": 4, "top_k": 2, "hidden_dim": 8, "dropout": 0.0}
    config = LSTMMoELMConfig(**{**sizes, **options})
    model = LSTMMoELM.build_model(config, task or make_task()).eval()
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            nn.init.normal_(parameter)
    return model


def make_sample(*sentences: str) -> dict[str, Any]:
    """Return a batch of a text, one sentence per row, as fairseq's collater does."""
    target, lengths = make_tokens(*sentences, pad_left=False)
    dictionary = make_dictionary()
    source = target.roll(1, dims=1)
    source[:, 0] = dictionary.eos()
    source = source.masked_fill(target.eq(dictionary.pad()), dictionary.pad())
    return {
        "id": torch.arange(len(sentences)),
        "nsentences": len(sentences),
        "ntokens": int(lengths.sum()),
        "net_input": {"src_tokens": source, "src_lengths": lengths},
        "target": target,
    }


SAMPLE = make_sample("abcd", "jihgfe", "e")
