"""A search encodes each sentence once, and evaluates only live hypotheses."""

import math
import random
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fairseq.models import fconv as fairseq_fconv
from fairseq.models.transformer import TransformerModel, transformer_legacy
from fairseq.sequence_generator import SequenceGenerator

from nmt_moe.generation.ensemble import EnsembleState, EnsembleStep, RowEnsemble
from nmt_moe.generation.generator import GNMTGenerator
from nmt_moe.nn import WIRINGS
from nmt_moe.search import SearchConfig
from tests.support.enumeration import DICTIONARY, UNUSED
from tests.support.models import make_dictionary, make_model, make_task, make_tokens
from tests.support.searching import make_models, search

SOURCES = ["cab", "abcdefghij", "j", "ab"]
BEAM = 5
SIDES = ("encoder", "decoder")
OPTIONS = {"beam_size": BEAM, "max_len_b": 9}


def search_as_fairseq(models: list[Any], *sources: str, **options: Any) -> list[list[dict]]:
    generator = SequenceGenerator(
        models, DICTIONARY, tokens_to_suppress=UNUSED, unk_penalty=math.inf, **options
    )
    src_tokens, src_lengths = make_tokens(*sources)
    sample = {"net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths}}
    return generator.generate(models, sample)


def search_with_penalties(models: list[Any], *sources: str, **options: Any) -> list[list[dict]]:
    penalties = {"length_penalty_alpha": 0.2, "coverage_penalty_beta": 0.2}
    return search(models, *sources, **penalties, **options)


def search_with_pruning(models: list[Any], *sources: str, **options: Any) -> list[list[dict]]:
    return search(models, *sources, beam_prune=1.0, **options)


SEARCHES = [search_as_fairseq, search_with_penalties, search_with_pruning]
Search = Callable[..., list[list[dict]]]


def count_rows(module: torch.nn.Module, index: int = 0, axis: int = 0) -> list[int]:
    """Return a list to which each call appends the number of rows in one of its arguments."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[index].shape[axis]))
    return rows


def decoder_of(model: Any) -> torch.nn.Module:
    # fairseq calls `decoder.forward` directly, so the decoder's hooks do not run.
    return model.decoder.network


@pytest.mark.parametrize("find", SEARCHES)
def test_the_encoder_and_the_keys_of_attention_see_each_sentence_once(find: Search):
    models = make_models()
    encoder = models[0].encoder.network
    encoded, keyed = count_rows(encoder), count_rows(encoder.attention_keys)
    find(models, *SOURCES, **OPTIONS)
    assert encoded == keyed == [len(SOURCES)]


@pytest.mark.parametrize("find", SEARCHES)
def test_experts_see_all_hypotheses_of_a_step_at_once(find: Search):
    models = make_models()
    decoder = decoder_of(models[0])
    steps = count_rows(decoder)
    calls = count_rows(decoder.moe, axis=1)  # (1, R, D)
    find(models, *SOURCES, **OPTIONS)
    assert calls == steps
    assert len(steps) == OPTIONS["max_len_b"] + 1


def test_finished_sentences_leave_the_batch(monkeypatch: pytest.MonkeyPatch):
    models = make_models()
    forward = models[0].decoder.forward

    def forward_to_the_end(*args: Any, **options: Any) -> tuple:
        logits, extra = forward(*args, **options)
        logits[..., DICTIONARY.eos()] += 4.0  # makes some sentences end early
        return logits, extra

    monkeypatch.setattr(models[0].decoder, "forward", forward_to_the_end)
    rows = count_rows(decoder_of(models[0]))
    found = search_with_penalties(models, *SOURCES, beam_size=2, max_len_b=9)
    # A sentence is finished when its last hypothesis ends. It has only one row at the first step.
    steps = [max(len(one["tokens"]) for one in hypotheses) for hypotheses in found]
    later = [2 * sum(step < last for last in steps) for step in range(1, max(steps))]
    assert rows == [len(SOURCES), *later]
    assert len(set(steps)) > 1


def test_pruned_hypotheses_leave_the_batch():
    models = make_models()
    rows = count_rows(decoder_of(models[0]))
    search_with_pruning(models, *SOURCES, **OPTIONS)
    assert rows[0] == len(SOURCES)
    assert sum(rows) < BEAM * len(SOURCES) * len(rows) / 2


def tokens_of(hypotheses: list[dict]) -> list[list[int]]:
    return [one["tokens"].tolist() for one in hypotheses]


def assert_same_hypotheses(
    found: list[list[dict]], expected: list[list[dict]], attention: bool = True
) -> None:
    """Check that n-best lists have equal tokens, and numbers that agree to 1e-5."""
    for mine, others in zip(found, expected, strict=True):
        assert [one["tokens"].tolist() for one in mine] == [
            one["tokens"].tolist() for one in others
        ]
        for one, other in zip(mine, others, strict=True):
            for name in ["score", "positional_scores"] + ["attention"] * attention:
                torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_without_penalties_and_pruning_hypotheses_are_those_of_fairseq(seed: int):
    chance = random.Random(seed)
    models = [
        make_model(seed=10 * seed + number, attention_wiring=chance.choice(WIRINGS))
        for number in range(chance.choice([1, 1, 2]))
    ]
    for model in models:
        model.decoder.output.weight.data *= chance.choice([1, 4, 8])
    letters = make_dictionary()
    longest = chance.randint(3, 12)
    options = {
        "beam_size": chance.randint(1, 6),
        "max_len_a": chance.choice([0, 0.5]),
        "max_len_b": longest,
        "min_len": chance.randint(1, 3),
        "len_penalty": chance.choice([0.0, 0.6, 1.0, 1.3]),
        "normalize_scores": chance.random() < 0.8,
        "unk_penalty": chance.choice([0.0, 0.7, -0.5]),
        "temperature": chance.choice([0.7, 1.0, 1.5]),
    }
    sources = ["".join(chance.choices("abcdefghij", k=chance.randint(1, 9))) for _ in range(7)]
    src_tokens, src_lengths = make_tokens(*sources, pad_left=chance.random() < 0.5)
    sample = {"net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths}}
    prefixes = torch.randint(letters.nspecial, len(letters), (7, chance.randint(1, 3)))
    for prefix in (None, prefixes):
        mine = GNMTGenerator(models, letters, SearchConfig(), **options)
        found = mine.generate(models, sample, prefix_tokens=prefix)
        fairseqs = SequenceGenerator(models, letters, **options)
        expected = fairseqs.generate(models, sample, prefix_tokens=prefix)
        assert_same_hypotheses(found, expected)
        assert all(len(one) == options["beam_size"] for one in found)


def make_fairseqs(kind: str) -> Any:
    """Return fairseq's Transformer or convolutional model with sharpened outputs."""
    torch.manual_seed(3)
    task = make_task()
    model: Any
    if kind == "transformer":
        sizes = {"embed_dim": 16, "ffn_embed_dim": 16, "layers": 2, "attention_heads": 2}
        sides = {f"{side}_{name}": size for side in SIDES for name, size in sizes.items()}
        args = Namespace(**sides, no_cross_attention=False)
        transformer_legacy.base_architecture(args)
        model = TransformerModel.build_model(args, task).eval()
        model.decoder.output_projection.weight.data *= 6
    else:
        args = Namespace(encoder_layers="[(16, 3)]", decoder_layers="[(16, 3)]", dropout=0.0)
        args.encoder_embed_dim = args.decoder_embed_dim = args.decoder_out_embed_dim = 16
        args.max_source_positions = args.max_target_positions = 64
        fairseq_fconv.base_architecture(args)
        model = fairseq_fconv.FConvModel.build_model(args, task).eval()
        model.decoder.fc3.weight_g.data *= 6
        model.make_generation_fast_(beamable_mm_beam_size=BEAM)
        model.decoder.need_attn = True
    return model


@pytest.mark.parametrize("kind", ["transformer", "fconv"])
def test_fairseqs_own_models_find_the_same_hypotheses_in_any_batch(kind: str):
    models = [make_fairseqs(kind)]
    letters = make_dictionary()
    options = {"beam_size": BEAM, "max_len_b": 9}
    sources = ["cab", "abcdefghij", "j", "abda", "ii", "gfedcba"]
    samples = []
    for texts in (sources, *([one] for one in sources)):
        src_tokens, src_lengths = make_tokens(*texts)
        samples.append({"net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths}})
    expected = SequenceGenerator(models, letters, **options).generate(models, samples[0])
    mine = GNMTGenerator(models, letters, SearchConfig(), **options)
    assert_same_hypotheses(mine.generate(models, samples[0]), expected)
    numbers = set()
    for margin in (0.5, 1.0, 1.5):
        pruning = GNMTGenerator(models, letters, SearchConfig(0.2, 0.0, margin), **options)
        together = pruning.generate(models, samples[0])
        numbers |= {len(one) for one in together}
        for hypotheses, sample in zip(together, samples[1:], strict=True):
            assert_same_hypotheses([hypotheses], pruning.generate(models, sample), attention=False)
    assert len(numbers) > 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["transformer", "fconv"])
def test_rows_keep_their_source_if_one_sentence_gains_as_many_as_another_loses(kind: str):
    model = make_fairseqs(kind)
    ensemble = RowEnsemble([model])
    ensemble.set_decoder_beam_size(BEAM)
    src_tokens, src_lengths = make_tokens("cabd", "abjdj")
    net_input = {"src_tokens": src_tokens, "src_lengths": src_lengths}
    step, sentence = EnsembleStep(), torch.arange(2)
    state = EnsembleState(ensemble, ensemble.forward_encoder(net_input), [{}], sentence)
    tokens = torch.full((2, 1), DICTIONARY.eos())
    for rows in ([0, 0, 1], [0, 2, 2], [2, 1, 0], [1, 1, 2]):
        log_probs, _, state = step(tokens, state)
        whole = model(src_tokens[sentence], src_lengths[sentence], tokens)
        expected = model.get_normalized_probs(whole, log_probs=True)[:, -1]
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)
        state = state.reorder(torch.tensor(rows))
        sentence, letters = sentence[rows], torch.arange(len(rows)).unsqueeze(1) + 5
        tokens = torch.cat([tokens[rows], letters], dim=1)
