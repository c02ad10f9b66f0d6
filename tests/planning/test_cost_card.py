"""The cost card, compared digit by digit with the paper's tables, and with real models."""

import json
import tracemalloc

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

pytest.importorskip("fairseq")

from nmt_moe.cli import main
from nmt_moe.moe import MoEConfig, MoELayer
from nmt_moe.nn import GNMTConfig, LSTMLanguageModel, LSTMLMConfig
from nmt_moe.planning import VOCABULARY, Card, find_configs, make_card
from nmt_moe.planning.network import build_modules

# Each row has the architecture, the operations per timestep and the parameters, in millions, as
# printed in Table 7 of Shazeer et al. 2017.
TABLE_7 = [
    ("lstm_lm_2048_512", "9.4", "9.4"),
    ("lstm_lm_4x512", "8.4", "8.4"),
    ("lstm_moe_lm_1_wide", "8.4", "8.4"),
    ("lstm_moe_lm_1_deep", "8.4", "8.4"),
    ("lstm_moe_lm_4", "8.4", "8.4"),
    ("lstm_moe_lm_32", "8.4", "37.8"),
    ("lstm_moe_lm_256", "8.6", "272.9"),
    ("lstm_moe_lm_256h", "8.4", "272.9"),
    ("lstm_moe_lm_1024h", "8.5", "1079.0"),
    ("lstm_moe_lm_4096h", "8.9", "4303.4"),
    ("lstm_moe_lm_34m", "33.8", "4313.9"),
    ("lstm_moe_lm_143m", "142.7", "4371.1"),
]
# These rows are from Table 8 of Shazeer et al. 2017. Its row 4xLSTM-512 is the same as in Table 7.
TABLE_8 = [
    ("lstm_moe_lm_100b_32", "8.4", "37.8"),
    ("lstm_moe_lm_100b_256h", "8.4", "272.9"),
    ("lstm_moe_lm_100b_1024h", "8.5", "1079.0"),
    ("lstm_moe_lm_100b_4096h", "8.6", "4303.4"),
    ("lstm_moe_lm_100b_16384h", "8.8", "17201.0"),
    ("lstm_moe_lm_100b_65536h", "9.2", "68791.0"),
    ("lstm_moe_lm_100b_131072h", "9.7", "137577.6"),
]


@pytest.fixture(scope="module")
def cards() -> dict[str, Card]:
    return {
        name: make_card(name, config, VOCABULARY[type(config)])
        for name, config in find_configs().items()
    }


def in_millions(count: int) -> str:
    return f"{count / 1e6:.1f}"


@pytest.mark.parametrize(("name", "ops", "params"), TABLE_7 + TABLE_8)
def test_a_language_model_costs_what_the_paper_prints(
    name: str, ops: str, params: str, cards: dict[str, Card]
):
    assert in_millions(cards[name].params) == params
    if name == "lstm_moe_lm_256":
        # This is the only digit that differs from the paper. Two LSTMs, 4 experts and both gate
        # matrices take 2 x 2097152 + 4 x 1048576 + 2 x 131072 = 8650752 operations, which is 0.01%
        # too many to be rounded to 8.6.
        assert (cards[name].ops, in_millions(cards[name].ops), ops) == (8_650_752, "8.7", "8.6")
    else:
        assert in_millions(cards[name].ops) == ops


TRANSLATION = [
    ("lstm_moe_gnmt", 85, None),
    ("lstm_moe_gnmt_512h", 85, None),
    ("lstm_moe_gnmt_2048h", 85, "8.7"),
    ("lstm_moe_gnmt_multilingual", 102, "8.7"),
]


@pytest.mark.parametrize(("name", "ops", "params"), TRANSLATION)
def test_translation_costs_what_the_paper_prints(
    name: str, ops: int, params: str | None, cards: dict[str, Card]
):
    # Tables 2-5 of Shazeer et al. 2017 give operations in millions and parameters in billions.
    card = cards[name]
    assert round(card.ops / 1e6) == ops
    if params is not None:
        # The embedding and the softmax may have 32,000 or 2^15 wordpieces.
        for count in (card.total, card.total + 2 * 512 * 768):
            assert f"{count / 1e9:.1f}" == params
    if ops == 85:  # with 2^15 wordpieces, 102 would become 103
        assert round((card.ops + 512 * 768) / 1e6) == 85


def test_the_bias_of_the_lstms_determines_the_last_digit_of_the_143m_model(
    cards: dict[str, Card],
):
    # Without the bias, the result would be 4371.0, but the paper prints 4371.1. Two LSTMs have one
    # bias for each of the 4 gates of their 4096 cells.
    card = cards["lstm_moe_lm_143m"]
    assert in_millions(card.params - 2 * 4 * 4096) == "4371.0"


def test_a_card_by_hand():
    # The model has D = 4, two LSTMs of 8 cells projected to 4, 3 groups of 2 experts with hidden
    # width 5, k = 2,2, and 10 symbols.
    moe = MoEConfig(model_dim=4, hidden_dim=5, num_experts=6, num_groups=3, top_k=2)
    config = LSTMLMConfig(model_dim=4, lstm_hidden_dim=8, moe=moe)
    card = make_card("by hand", config, 10)
    lstms = 2 * (4 * 8 * (4 + 4) + 8 * 4)
    expert = 2 * 4 * 5
    primary, secondary = 2 * 4 * 3, 2 * 4 * 2
    assert card.parts == {
        "LSTM": lstms,
        "gates": primary + 2 * secondary,
        "experts": 4 * expert,
        "softmax": 10 * 4,
    }
    assert card.ops == lstms + primary + 2 * secondary + 4 * expert
    assert card.params == lstms + 2 * 4 * 8 + primary + 3 * secondary + 6 * expert
    assert card.active == card.ops + 2 * 4 * 8
    # The total includes the second bias of torch's LSTMs, the embedding and the softmax.
    assert card.total == card.params + 2 * 4 * 8 + 2 * 10 * 4
    assert (card.weights_bytes, card.gradients_bytes) == (4 * card.total, 4 * card.total)
    assert card.adam_bytes == 8 * card.total
    # Factored Adam stores 4 + 5 numbers for each of an expert's two matrices.
    rows_and_columns = 6 * 2 * (4 + 5)
    assert card.factored_adam_bytes == 8 * (card.total - 6 * expert) + 4 * rows_and_columns


@pytest.mark.parametrize("gate", ["noisy_top_k", "strictly_balanced", "softmax"])
def test_the_total_is_that_of_a_real_model(gate: str):
    moe = MoEConfig(model_dim=4, hidden_dim=5, num_experts=6, top_k=2, gate=gate)
    config = LSTMLMConfig(model_dim=4, lstm_hidden_dim=8, moe=moe)
    network = LSTMLanguageModel(config, nn.Embedding(10, 4))
    numbers = sum(parameter.numel() for parameter in network.parameters()) + 10 * 4
    assert make_card("small", config, 10).total == numbers


def test_a_translation_model_counts_attention_separately():
    config = GNMTConfig(model_dim=4, lstm_hidden_dim=8)
    card = make_card("dense", config, 10)
    lstms = 5 * (4 * 8 * (4 + 4) + 8 * 4) + 4 * 8 * 4  # the last term is the context input
    assert card.parts["LSTM"] == lstms
    assert card.parts["attention"] == 2 * 4 * 4  # U and W
    assert card.ops == lstms + 10 * 4


def test_building_the_largest_model_takes_little_memory():
    config = find_configs()["lstm_moe_lm_100b_131072h"]
    tracemalloc.start()
    networks = build_modules(config, 793_471)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(p.device == torch.device("meta") for n in networks for p in n.parameters())
    assert peak < 10_000_000


def run(*flags: str) -> Result:
    return CliRunner().invoke(main, ["card", *flags])


def test_an_unknown_name_lists_similar_names():
    result = run("--arch", "lstm_moe_lm_4096")
    assert result.exit_code == 1
    message = "`--arch` must be an architecture of this project, but is 'lstm_moe_lm_4096'"
    assert f"{message}. Similar names: lstm_moe_lm_4096h" in result.stderr
    # A name is also found if it is typed in capitals.
    assert "'LSTM_GNMT_'. Similar names: lstm_gnmt, " in run("--arch", "LSTM_GNMT_").stderr
    assert 0 < run("--arch", "LSTM").stderr.partition("Similar names: ")[2].count("lstm") < 10


def test_for_a_name_unlike_all_others_all_names_are_listed():
    result = run("--arch", "zzz", "--json")
    assert result.exit_code == 1
    listed = result.stderr.partition("but is 'zzz'. Known names: ")[2].rstrip(".\n").split(", ")
    assert listed == list(find_configs())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--all", "--vocab-size", "0"], "`--vocab-size` must be at least 1, but is 0"),
        (["--all", "--arch", "lstm_gnmt"], "give either `--arch` or `--all`"),
        ([], "give either `--arch` or `--all`"),
    ],
)
def test_bad_input_is_refused(flags: list[str], message: str):
    result = run(*flags)
    assert result.exit_code == 1
    assert message in result.stderr


def test_json_holds_exact_numbers():
    result = run("--arch", "lstm_moe_lm_4", "lstm_gnmt", "--json", "--vocab-size", "1000")
    rows = json.loads(result.stdout)
    assert [row["architecture"] for row in rows] == ["lstm_moe_lm_4", "lstm_gnmt"]
    assert rows[0]["ops"] == 2 * 2_097_152 + 4 * 1_048_576 + 2 * 512 * 4
    assert rows[0]["parts"]["softmax"] == 512 * 1000


def test_the_table_has_every_architecture():
    header, *rows = run("--all").stdout.splitlines()
    assert header.split()[:3] == ["architecture", "ops", "M"]
    printed = {row.split()[0]: row.split()[1:3] for row in rows}
    for name, ops, params in TABLE_7 + TABLE_8:
        assert printed[name] == ["8.7" if name == "lstm_moe_lm_256" else ops, params]
    assert printed["lstm_moe_gnmt_2048h"][0] == "84.7"


def test_a_layer_on_the_meta_device_may_have_any_number_of_experts():
    with torch.device("meta"):
        layer = MoELayer(MoEConfig(model_dim=8, hidden_dim=8, num_experts=10**12))
    assert layer.experts.weight_in.shape == (10**12, 8, 8)
