"""The translation model works with fairseq's batches, searches, dictionaries and options."""

import dataclasses
from pathlib import Path

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from nmt_moe.models._early_options import rename_early_options
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import GNMTConfig
from tests.support.models import (
    LSTMMoEGNMTConfig,
    make_dictionary,
    make_model,
    make_sample,
    make_task,
    make_tokens,
)
from tests.support.training import load

WIRINGS = pytest.mark.parametrize("wiring", ["recurrent", "parallel"])
KINDS = pytest.mark.parametrize("kind", ["product", "additive"])
SOURCES = ["abc", "jihgfedcba", "e", "abcabca"]
TARGETS = ["ffab", "cd", "jjjjjjj", "a"]


def run(model: torch.nn.Module, sources: list[str], targets: list[str]) -> tuple[Tensor, Tensor]:
    """Return (B, T, V) logits and (B, T, S) attention."""
    with torch.no_grad():
        logits, extra = model(**make_sample(sources, targets)["net_input"])
    return logits, extra["attn"][0]


@WIRINGS
@KINDS
def test_padding_changes_nothing(wiring: str, kind: str):
    model = make_model(attention=kind, attention_wiring=wiring)
    logits, attention = run(model, SOURCES, TARGETS)
    for index, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        alone, alone_attention = run(model, [source], [target])
        steps, width = alone_attention.shape[1:]
        torch.testing.assert_close(logits[index, :steps], alone[0], atol=1e-5, rtol=0)
        # Padding is on the left, so the sentence itself occupies the last positions.
        own = attention[index, :steps, -width:]
        torch.testing.assert_close(own, alone_attention[0], atol=1e-5, rtol=0)
        assert attention[index, :steps, :-width].abs().sum() == 0


@WIRINGS
def test_the_side_of_the_padding_changes_nothing(wiring: str):
    model = make_model(attention_wiring=wiring)
    with torch.no_grad():
        left = model.encoder(*make_tokens(*SOURCES, pad_left=True))
        right = model.encoder(*make_tokens(*SOURCES, pad_left=False))
    for index, source in enumerate(SOURCES):
        width = len(source) + 1
        torch.testing.assert_close(left.source[index, -width:], right.source[index, :width])
        assert left.source[index, :-width].abs().sum() == 0
        assert right.padding_mask[index].tolist() == [False] * width + [True] * (11 - width)


@WIRINGS
@KINDS
def test_step_by_step_gives_the_same_as_all_steps_at_once(wiring: str, kind: str):
    model = make_model(attention=kind, attention_wiring=wiring, decoder_layers=3)
    sample = make_sample(["abcd", "jih"], ["fgh", "bba"])["net_input"]
    previous = sample["prev_output_tokens"]
    with torch.no_grad():
        logits, extra = model(**sample)
        encoder_out = model.encoder(sample["src_tokens"], sample["src_lengths"])
        state: dict = {}
        for step in range(previous.shape[1]):
            one, one_extra = model.decoder(previous[:, : step + 1], encoder_out, state)
            torch.testing.assert_close(one[:, 0], logits[:, step], atol=1e-5, rtol=0)
            row = one_extra["attn"][0][:, 0]
            torch.testing.assert_close(row, extra["attn"][0][:, step], atol=1e-5, rtol=0)


@WIRINGS
def test_hypotheses_keep_their_state_when_the_search_reorders_them(wiring: str):
    model = make_model(attention_wiring=wiring)
    src_tokens, lengths = make_tokens("abcd", "jih", "ee")
    starts = torch.tensor([[2, 5], [2, 6], [2, 7]])
    order = torch.tensor([2, 0, 0, 1])
    after = torch.cat([starts[order], torch.tensor([[4], [5], [6], [7]])], dim=1)

    def decode(encoder_out: object, state: dict, tokens: Tensor, steps: range) -> Tensor:
        for step in steps:
            out, _ = model.decoder(tokens[:, : step + 1], encoder_out, state)
        return out

    with torch.no_grad():
        encoder_out = model.encoder(src_tokens, lengths)
        state: dict = {}
        decode(encoder_out, state, starts, range(2))
        # As in fairseq's search, every submodule that can reorder its state does so.
        model.decoder.reorder_incremental_state_scripting(state, order)
        moved = decode(
            model.encoder.reorder_encoder_out(encoder_out, order), state, after, range(2, 3)
        )
        fresh = decode(model.encoder(src_tokens[order], lengths[order]), {}, after, range(3))
    torch.testing.assert_close(moved, fresh, atol=1e-5, rtol=0)


@WIRINGS
def test_a_search_encodes_each_sentence_once(wiring: str):
    model = make_model(attention_wiring=wiring)
    calls: list[tuple[str, int]] = []
    encoder = model.encoder.network
    for name, module in [("encoder", encoder), ("keys", encoder.attention_keys)]:
        module.register_forward_hook(
            lambda _, inputs, __, name=name: calls.append((name, len(inputs[0])))
        )
    src_tokens, src_lengths = make_tokens("abcd", "jih", "ee")
    search = SequenceGenerator([model], make_dictionary(), beam_size=4, max_len_b=9, min_len=6)
    hypotheses = search.generate(
        [model], {"net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths}}
    )
    assert all(len(nbest) == 4 and len(nbest[0]["tokens"]) >= 6 for nbest in hypotheses)
    # The encoder runs once, over three sentences instead of twelve hypotheses.
    assert calls == [("keys", 3), ("encoder", 3)]


def test_equal_dictionaries_share_their_embedding():
    model = make_model()
    assert model.encoder.network.embedding is model.decoder.network.embedding
    assert model.decoder.output.weight is not model.decoder.network.embedding.weight


def test_different_dictionaries_have_separate_embeddings():
    model = make_model(make_task("abc", "abcde"))
    assert model.encoder.network.embedding.weight.shape == (4 + 3, 12)
    assert model.decoder.network.embedding.weight.shape == (4 + 5, 12)


def test_the_softmax_can_share_the_embedding():
    model = make_model(share_decoder_input_output_embed=True)
    assert model.decoder.output.weight is model.decoder.network.embedding.weight


def test_a_model_refuses_the_weights_of_another_dictionary_of_the_same_size():
    trained = make_model(make_task("abcdefghij", "jihgfedcba")).state_dict()
    make_model(make_task("abcdefghij", "jihgfedcba"), seed=2).load_state_dict(trained)
    with pytest.raises(RuntimeError, match="target dictionary of 14 symbols is not the one"):
        make_model(make_task("abcdefghij", "ihgfedcbaj")).load_state_dict(trained)


def test_weights_saved_before_dictionaries_were_compared_still_load():
    state = make_model(seed=2).state_dict()
    early = {name: value for name, value in state.items() if not name.endswith("digest")}
    assert len(early) == len(state) - 2
    make_model().load_state_dict(early)


def core_fields() -> list[tuple[str, dataclasses.Field, type]]:
    """Return each field of the core's configurations with its name and owner."""
    owners = (GNMTConfig, MoEConfig)
    return [(f.name, f, o) for o in owners for f in dataclasses.fields(o) if f.name != "moe"]


def test_options_have_the_names_and_defaults_of_the_core():
    options = {f.name: f for f in dataclasses.fields(LSTMMoEGNMTConfig) if f.name != "_name"}
    for name, core, _ in core_fields():
        assert name in options, name
        if core.default is not dataclasses.MISSING:
            assert options[name].default == core.default, name
    of_the_shell = {"dense", "share_decoder_input_output_embed", "expert_parallel_size"}
    assert options.keys() - {name for name, _, _ in core_fields()} == of_the_shell
    assert all(option.metadata["help"] for option in options.values())


def another_value(name: str) -> object:
    """Return a value other than the default."""
    default = getattr(LSTMMoEGNMTConfig(), name)
    if isinstance(default, str):
        return {
            "attention": "additive",
            "attention_wiring": "parallel",
            "gate": "softmax",
            "recompute": "always",
        }[name]
    if name in ("num_groups", "decoder_num_experts"):
        return 4
    return default / 2 if isinstance(default, float) else default + 1


@pytest.mark.parametrize(
    ("name", "core", "owner"), [pytest.param(*row, id=row[0]) for row in core_fields()]
)
def test_an_option_reaches_the_core(name: str, core: dataclasses.Field, owner: type):
    value = another_value(name)
    config = LSTMMoEGNMTConfig(**{name: value}).to_config()
    assert getattr(config if owner is GNMTConfig else config.moe, core.name) == value


def test_the_default_is_the_single_pair_model_of_the_paper():
    config = LSTMMoEGNMTConfig().to_config()
    assert (config.model_dim, config.lstm_hidden_dim) == (512, 2048)
    assert (config.encoder_layers, config.decoder_layers) == (3, 2)
    assert (config.moe.num_experts, config.moe.top_k, config.moe.hidden_dim) == (32, 4, 2048)
    assert config.attention_wiring == "recurrent"


def test_a_checkpoint_holds_only_plain_data(checkpoint: Path):
    state = load(checkpoint)  # refuses types that torch does not know
    assert isinstance(state["cfg"], dict)
    assert state["cfg"]["model"]["num_experts"] == 4
    assert type(state["cfg"]["model"]) is dict


def test_options_of_early_checkpoints_get_their_current_names():
    early = {
        "moe_top_k": 3,
        "expert_hidden_dim": 7,
        "moe_gate": "softmax",
        "moe_groups": 0,
        "importance_loss_weight": 0.5,
        "load_loss_weight": 0.6,
        "expert_recompute": "never",
    }
    rename_early_options(early)
    config = LSTMMoEGNMTConfig(**early).to_config().moe
    assert (config.top_k, config.hidden_dim, config.gate) == (3, 7, "softmax")
    assert (config.importance_weight, config.load_weight) == (0.5, 0.6)
    of_another_model = {"moe_top_k": 3}
    rename_early_options(of_another_model)
    assert of_another_model == {"moe_top_k": 3}
