"""Translate with GNMT's search and a tiny model."""

import math
from collections.abc import Sequence
from typing import Any

from nmt_moe.generation.generator import GNMTGenerator
from nmt_moe.nn.attention import Attention
from nmt_moe.search import SearchConfig
from tests.support.enumeration import BEAM, DICTIONARY, LONGEST, UNUSED, wide_task
from tests.support.models import make_model, make_tokens


def make_models(count: int = 1, sharpness: float = 4.0) -> list[Any]:
    """Build models whose probabilities and attention weights are far from uniform."""
    models = [make_model(wide_task(), seed=seed) for seed in range(2, count + 2)]
    for model in models:
        model.decoder.output.weight.data *= sharpness
        for module in model.decoder.modules():
            if isinstance(module, Attention):
                module.scale.data *= 10
    return models


def search(
    models: Sequence[Any], *sources: str, pad_left: bool = True, **options: Any
) -> list[list[dict]]:
    """Translate sentences with options for the search and for fairseq's generator."""
    names = SearchConfig.__dataclass_fields__
    config = SearchConfig(**{name: options.pop(name) for name in list(options) if name in names})
    options = {"beam_size": BEAM, "max_len_b": LONGEST, **options}
    generator = GNMTGenerator(
        models, DICTIONARY, config, tokens_to_suppress=UNUSED, unk_penalty=math.inf, **options
    )
    src_tokens, src_lengths = make_tokens(*sources, pad_left=pad_left)
    sample = {"net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths}}
    return generator.generate(models, sample)


def text(hypothesis: dict) -> str:
    return DICTIONARY.string(hypothesis["tokens"]).replace(" ", "")


def scores(hypotheses: list[dict]) -> dict[str, float]:
    return {text(one): float(one["score"]) for one in hypotheses}
