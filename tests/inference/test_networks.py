"""The networks of a bundle give the same results as the networks used in training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from nmt_moe.inference.layers import Trace
from nmt_moe.inference.opening import open_bundle
from nmt_moe.inference.searching import share_batches
from nmt_moe.moe import MoEConfig
from tests.support.bundles import GNMT, LM, MOE, make_bundle

SENTENCES = [[5, 9, 11, 2], [7, 2], [8, 8, 10, 12, 20, 4, 2]]
TARGETS = [[2, 6, 9, 30, 22], [2, 11, 12, 30, 9], [2, 13, 5, 6, 7]]

SIZES = {"model_dim": 16, "hidden_dim": 24}
MOES = {
    "flat": MOE,
    "all": MoEConfig(**SIZES, num_experts=3, gate="softmax", top_k=3),
    "hierarchical": MoEConfig(**SIZES, num_experts=8, num_groups=4, top_k=2),
    "strict": MoEConfig(**SIZES, num_experts=4, top_k=2, gate="strictly_balanced"),
    "strict hierarchical": MoEConfig(
        **SIZES, num_experts=8, num_groups=2, top_k=2, gate="strictly_balanced"
    ),
    "one": MoEConfig(**SIZES, num_experts=1, top_k=1),
    "dense": None,
}
CONFIGS = {
    **{name: replace(GNMT, moe=moe) for name, moe in MOES.items()},
    "parallel": replace(GNMT, attention_wiring="parallel"),
    "additive": replace(GNMT, attention="additive"),
    "unprojected": replace(GNMT, lstm_hidden_dim=16, attention_wiring="parallel"),
    "deep": replace(GNMT, encoder_layers=5, decoder_layers=4),
}


def encode(networks: dict[str, Any]) -> Any:
    longest = max(map(len, SENTENCES))
    tokens = torch.tensor([s + [1] * (longest - len(s)) for s in SENTENCES])
    with torch.no_grad():
        return networks["encoder"](tokens, tokens.eq(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_translation_network_equals_the_one_used_in_training(name: str, tmp_path: Path):
    folder, networks = make_bundle(tmp_path, CONFIGS[name])
    network: Any = open_bundle(folder, "translation").network
    expected = encode(networks)
    memory = network.encode(SENTENCES, 1)
    is_token = ~expected.padding_mask
    assert_close(memory.source, expected.source, atol=1e-5, rtol=1e-5)
    assert_close(memory.keys[is_token], expected.keys[is_token], atol=1e-5, rtol=1e-5)

    targets = torch.tensor(TARGETS)
    with torch.no_grad():
        out = networks["decoder"](targets, expected)
        log_probs = networks["output"](out.features).log_softmax(dim=2)
    state = network.start(memory)
    for step in range(targets.shape[1]):
        found, attention, state = network.step(targets[:, : step + 1], state)
        assert_close(found, log_probs[:, step], atol=2e-5, rtol=1e-5)
        assert_close(attention, out.attention[:, step], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flat", "hierarchical", "strict"])
def test_traced_experts_are_those_used_in_training(name: str, tmp_path: Path):
    folder, networks = make_bundle(tmp_path, CONFIGS[name])
    network: Any = open_bundle(folder, "translation").network
    trace = Trace([], [])
    network.encode(SENTENCES, 1, trace)
    expected = encode(networks)
    stats, width = expected.moe_stats, max(map(len, SENTENCES))
    grid = stats.expert_ids.view(width, len(SENTENCES), -1)  # steps first
    wanted = torch.cat([grid[: len(s), n] for n, s in enumerate(SENTENCES)])
    assert torch.equal(trace.expert_ids[0], wanted)
    assert torch.equal(
        trace.gates[0].gt(0),
        torch.cat(
            [stats.gates.view(width, 3, -1)[: len(s), n] for n, s in enumerate(SENTENCES)]
        ).gt(0),
    )


@pytest.mark.parametrize("wiring", ["recurrent", "parallel"])
def test_reordered_hypotheses_keep_their_states(wiring: str, tmp_path: Path):
    folder, _ = make_bundle(tmp_path, replace(GNMT, attention_wiring=wiring))
    network: Any = open_bundle(folder, "translation").network
    tokens = torch.tensor(TARGETS)
    state = network.start(network.encode(SENTENCES, 1))
    _, _, state = network.step(tokens[:, :1], state)
    whole = network.step(tokens[:, :2], state)
    for rows in ([0, 0, 1, 2, 2, 2], [1, 2], [2], [0, 0, 0], [0, 2, 2]):
        picked = network.step(tokens[rows, :2], state.reorder(torch.tensor(rows)))
        assert_close(picked[0], whole[0][rows], atol=1e-5, rtol=1e-5)
        assert_close(picked[1], whole[1][rows], atol=1e-5, rtol=1e-5)
        again = network.step(tokens[rows, :3], picked[2])
        once = network.step(tokens[:, :3], whole[2])
        assert_close(again[0], once[0][rows], atol=1e-5, rtol=1e-5)


LMS = {
    "flat": LM,
    "hierarchical": replace(LM, moe=MOES["hierarchical"]),
    "deep expert": replace(LM, moe=MOES["one"], expert_layers=3),
    "dense": replace(LM, moe=None, lstm_layers=4),
}


@pytest.mark.parametrize("name", LMS)
def test_a_language_models_network_equals_the_one_used_in_training(name: str, tmp_path: Path):
    folder, networks = make_bundle(tmp_path, LMS[name])
    network: Any = open_bundle(folder, "language_model").network
    read = torch.tensor(TARGETS)
    follow = torch.tensor([[6, 9, 30, 22, 2], [11, 12, 30, 9, 2], [13, 5, 6, 7, 2]])
    with torch.no_grad():
        out = networks["decoder"](read)
        log_probs = networks["output"](out.features).log_softmax(dim=2)
    wanted = log_probs.gather(2, follow.unsqueeze(2)).squeeze(2)
    found = network.score(read.t(), [5, 5, 3], follow.t()).t()
    assert_close(found[:2], wanted[:2], atol=1e-5, rtol=1e-5)
    assert_close(found[2, :3], wanted[2, :3], atol=1e-5, rtol=1e-5)
    assert not found[2, 3:].any()
    states = network.start(3)
    for step in range(read.shape[1]):
        one, states = network.step(read[:, step], states)
        assert_close(one, log_probs[:, step], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("int8", 0.5)])
def test_smaller_dtypes_are_close(dtype: str, tolerance: float, tmp_path: Path):
    folder, _ = make_bundle(tmp_path / "wide", GNMT)
    small, _ = make_bundle(tmp_path / "small", GNMT, dtype)
    sides = []
    for path in (folder, small):
        network: Any = open_bundle(path, "translation").network
        state = network.start(network.encode(SENTENCES, 1))
        sides.append(network.step(torch.tensor(TARGETS)[:, :1], state)[0])
    assert 0 < (sides[0] - sides[1]).abs().max() < tolerance


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("batch_tokens", [40, 1200, 10_000])
def test_threads_share_batches_evenly(num_threads, batch_tokens):
    lengths = torch.Generator().manual_seed(1)
    sentences = [[0] * int(torch.randint(1, 30, (), generator=lengths)) for _ in range(100)]
    batches = share_batches(sentences, batch_tokens, num_threads)
    assert sorted(number for batch in batches for number in batch) == list(range(100))
    sizes = [len(batch) * max(len(sentences[number]) for number in batch) for batch in batches]
    assert max(sizes) <= batch_tokens
    if batch_tokens == 10_000:
        assert len(batches) == 1
    elif batch_tokens == 1200 and num_threads > 1:
        assert len(batches) % num_threads == 0
        assert min(sizes) > 0.5 * max(sizes)
