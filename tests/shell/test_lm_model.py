"""The language model in fairseq, with its architectures, its options and the steps of a search."""

import dataclasses
from argparse import Namespace
from typing import Any

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY

from nmt_moe.criterions import MoECrossEntropy
from nmt_moe.models.lstm_moe_lm import LSTMMoELM, LSTMMoELMConfig
from nmt_moe.models.lstm_moe_lm_sizes import TABLE_7, TABLE_8
from nmt_moe.moe import MoEConfig
from nmt_moe.nn import LSTMLMConfig
from tests.support.text_models import SAMPLE, make_model, make_task

ARCHITECTURES = [*TABLE_7, *TABLE_8]


def sizes_of(architecture: str, **reduced: Any) -> LSTMMoELMConfig:
    """Return an architecture's options with some sizes reduced."""
    args = Namespace(**reduced)
    ARCH_CONFIG_REGISTRY[architecture](args)
    return LSTMMoELMConfig(**vars(args))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_learns_at_reduced_width(architecture: str):
    # Keep all groups of the largest models, but only two experts in each group.
    full = sizes_of(architecture).to_config()
    few = {}
    if full.moe is not None and full.moe.num_experts > 4096:
        few = {"num_experts": full.moe.num_groups * 2}
    cells = 16 if full.lstm_hidden_dim > full.model_dim else 8
    reduced = {"model_dim": 8, "lstm_hidden_dim": cells, "hidden_dim": 4, **few}
    config = sizes_of(architecture, **reduced)
    assert config.to_config().lstm_layers == full.lstm_layers
    torch.manual_seed(1)
    model = LSTMMoELM.build_model(config, make_task()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    criterion = MoECrossEntropy(make_task(), sentence_avg=False, sampled_softmax=0)
    losses = []
    for _ in range(3):
        loss, size, log = criterion(model, SAMPLE)
        optimizer.zero_grad()
        (loss / size).backward()
        optimizer.step()
        losses.append((log["nll_loss"] / size).item())
    assert losses[-1] < losses[0]
    logs_balance = full.moe is not None and full.expert_layers == 1
    assert ("decoder_moe_load" in log) == logs_balance


def test_a_model_with_4096_experts_in_16_groups_computes_gradients():
    config = sizes_of("lstm_moe_lm_4096h", model_dim=16, lstm_hidden_dim=16, hidden_dim=8)
    torch.manual_seed(1)
    model = LSTMMoELM.build_model(config, make_task()).train()
    assert model.decoder.network.moe.moe.experts.weight_in.shape == (4096, 16, 8)
    criterion = MoECrossEntropy(make_task(), sentence_avg=False, sampled_softmax=0)
    loss, size, log = criterion(model, SAMPLE)
    loss.backward()
    assert log["decoder_moe_load"].shape == (4096,)
    chosen = model.decoder.network.moe.moe.experts.weight_in.grad.flatten(1).any(1).sum()
    assert 4 <= chosen <= 4 * size


def test_architectures_match_the_rows_of_the_papers_tables():
    rows = {name: sizes_of(name).to_config() for name in ARCHITECTURES}
    assert len(rows) == 19
    for name, config in rows.items():
        if config.moe is not None and config.moe.num_experts > 1:
            assert config.moe.importance_weight == config.moe.load_weight == 0.1, name
            assert config.moe.top_k == (2 if config.moe.num_groups else 4), name
    largest = rows["lstm_moe_lm_143m"]
    assert (largest.model_dim, largest.lstm_hidden_dim, largest.dropout) == (1024, 4096, 0.4)
    deep = rows["lstm_moe_lm_1_deep"]
    assert (deep.expert_layers, deep.moe.hidden_dim) == (4, 1024)


# The paper uses these values for language models. The layer's defaults are for translation.
OTHER_DEFAULTS = {"importance_weight": 0.1, "load_weight": 0.1}


def test_options_have_the_names_and_defaults_of_the_core_and_reach_it():
    options = {f.name: f for f in dataclasses.fields(LSTMMoELMConfig) if f.name != "_name"}
    core = [f for f in dataclasses.fields(LSTMLMConfig) if f.name != "moe"]
    for f in [*core, *dataclasses.fields(MoEConfig)]:
        assert options[f.name].metadata["help"]
        if f.default is not dataclasses.MISSING:
            assert options[f.name].default == OTHER_DEFAULTS.get(f.name, f.default), f.name
    given = {
        "lstm_hidden_dim": 600,
        "lstm_layers": 3,
        "dropout": 0.7,
        "init_range": 0.2,
        "num_experts": 12,
        "top_k": 3,
        "hidden_dim": 7,
        "num_groups": 3,
        "gate": "strictly_balanced",
        "importance_weight": 0.5,
        "load_weight": 0.6,
        "recompute": "never",
    }
    config = LSTMMoELMConfig(**given).to_config()
    for name, value in given.items():
        owner = config if hasattr(config, name) else config.moe
        assert getattr(owner, name) == value, name


def test_more_experts_per_token_than_a_group_has_are_refused_by_option():
    with pytest.raises(ValueError, match="`top_k` must be from 1 to 2, but is 3"):
        LSTMMoELMConfig(num_experts=8, num_groups=4, top_k=3).to_config()
    with pytest.raises(ValueError, match="`expert_layers` must be 1 .*`num_experts` to 1"):
        LSTMMoELMConfig(expert_layers=4).to_config()


def test_step_by_step_gives_the_same_as_all_steps_at_once_and_reorders():
    model = make_model()
    source = SAMPLE["net_input"]["src_tokens"][:2, :5]
    order = torch.tensor([1, 0, 1])
    with torch.no_grad():
        logits, extra = model(source)
        assert extra["attn"] is None
        state: dict = {}
        for step in range(3):
            one, _ = model.decoder(source[:, : step + 1], incremental_state=state)
            torch.testing.assert_close(one[:, 0], logits[:, step], atol=1e-5, rtol=0)
        model.decoder.reorder_incremental_state_scripting(state, order)
        moved, _ = model.decoder(source[order][:, :4], incremental_state=state)
    torch.testing.assert_close(moved[:, 0], logits[order, 3], atol=1e-5, rtol=0)


def test_features_times_the_softmax_weight_are_the_logits():
    model = make_model()
    logits, _ = model(**SAMPLE["net_input"])
    features, extra = model(**SAMPLE["net_input"], features_only=True)
    assert features.shape == (3, 7, 8)
    assert extra["moe_stats"].keys() == {"decoder"}
    torch.testing.assert_close(model.output_layer(features), logits)
    torch.testing.assert_close(model.extract_features(**SAMPLE["net_input"])[0], features)


def test_the_embedding_can_be_the_softmax_weight_unless_the_output_is_shorter():
    tied = make_model(share_decoder_input_output_embed=True).decoder
    assert tied.output.weight is tied.network.embedding.weight
    shorter = make_model(task=make_task(num_outputs=9)).decoder
    assert shorter.output.weight.shape == (9, 8)
    with pytest.raises(ValueError, match=r"each of the 14 symbols.*`--output-dictionary-size`.* 9"):
        make_model(task=make_task(num_outputs=9), share_decoder_input_output_embed=True)


def test_a_model_refuses_the_weights_of_another_dictionary_of_the_same_size():
    trained = make_model().state_dict()
    make_model(seed=2).load_state_dict(trained)
    with pytest.raises(RuntimeError, match="text's dictionary of 14 symbols is not the one"):
        make_model(task=make_task("jihgfedcba")).load_state_dict(trained)
