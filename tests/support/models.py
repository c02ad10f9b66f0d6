"""A tiny model, its dictionaries and its batches, without the commands."""

from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from nmt_moe import plugin
from nmt_moe.moe import NoisyTopKGate

plugin.register()

from nmt_moe.models.lstm_moe_gnmt import LSTMMoEGNMT, LSTMMoEGNMTConfig  # noqa: E402

SIZES = {
    "model_dim": 12,
    "lstm_hidden_dim": 16,
    "num_experts": 4,
    "top_k": 2,
    "hidden_dim": 8,
    "init_range": 0.4,
    "dropout": 0.0,
}


def make_dictionary(words: str = "abcdefghij") -> Dictionary:
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word)
    return dictionary


def make_task(source: str = "abcdefghij", target: str = "abcdefghij") -> Any:
    """Return the parts of a task that models and criterions need; each letter is a word."""
    return SimpleNamespace(
        source_dictionary=make_dictionary(source), target_dictionary=make_dictionary(target)
    )


def make_model(task: Any = None, seed: int = 1, **options: Any) -> LSTMMoEGNMT:
    """Build a model in evaluation mode, with gates that are not uniform."""
    torch.manual_seed(seed)
    config = LSTMMoEGNMTConfig(**{**SIZES, **options})
    model = LSTMMoEGNMT.build_model(config, task or make_task()).eval()
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(parameter)
    return model


def without_noise(model: nn.Module) -> nn.Module:
    """Set a model's noise to zero, so that two equal halves of a batch give equal results."""

    def give_zeros(gate: NoisyTopKGate, inputs: tuple) -> tuple:
        x, _, *rest = inputs
        return x, torch.zeros(len(x), gate.gate_weight.shape[-1]), *rest

    for module in model.modules():
        if isinstance(module, NoisyTopKGate):
            module.register_forward_pre_hook(give_zeros)
    return model


def make_tokens(*sentences: str, pad_left: bool = True) -> tuple[Tensor, Tensor]:
    """Return (B, S) tokens and (B,) lengths; each sentence ends with the end mark."""
    dictionary = make_dictionary()
    rows = [[dictionary.index(word) for word in text] + [dictionary.eos()] for text in sentences]
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), dictionary.pad())
    for index, row in enumerate(rows):
        start = longest - len(row) if pad_left else 0
        tokens[index, start : start + len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) for row in rows])


def make_sample(sources: list[str], targets: list[str]) -> dict[str, Any]:
    """Return a batch like those of fairseq's collater."""
    src_tokens, src_lengths = make_tokens(*sources)
    target, lengths = make_tokens(*targets, pad_left=False)
    eos, pad = make_dictionary().eos(), make_dictionary().pad()
    previous = target.roll(1, dims=1)
    previous[:, 0] = eos
    # In shorter sentences, the rolled tokens contain the end mark before the padding. Like fairseq,
    # replace it with padding.
    previous = previous.masked_fill(torch.arange(target.shape[1]) >= lengths[:, None], pad)
    return {
        "id": torch.arange(len(sources)),
        "nsentences": len(sources),
        "ntokens": int(lengths.sum()),
        "net_input": {
            "src_tokens": src_tokens,
            "src_lengths": src_lengths,
            "prev_output_tokens": previous,
        },
        "target": target,
    }
