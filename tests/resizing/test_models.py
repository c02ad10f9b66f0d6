"""Checkpoints and bundles with changed experts."""

import json
from dataclasses import replace

import pytest
import torch

from nmt_moe import LanguageModel, Translator
from nmt_moe.checkpoints import EXPERT_NAMES, load_checkpoint
from nmt_moe.checkpoints.network import read_network
from nmt_moe.checkpoints.reshape import split
from nmt_moe.inference import Pieces, export
from nmt_moe.inference.weights import map_file
from nmt_moe.resizing import read_model, upcycle
from tests.support.bundles import GNMT, LM, make_bundle, make_checkpoint, make_networks

SENTENCES = ["the big cat sees a dog", "a house under the tree", "red"]
KEPT = {"encoder": [0, 2, 5], "decoder": [1, 2, 3]}
DENSE = replace(GNMT, moe=replace(GNMT.moe, num_experts=1, top_k=1))


def prune(path, output, kept):
    model = read_model(path)
    model.write(output, {s: one.take(kept[s]) for s, one in model.layers.items()}, "pruned")
    return read_model(output)


def test_a_pruned_checkpoint_exports_to_the_pruned_bundle(tmp_path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    export(path, data, Pieces(pieces), tmp_path / "bundle")
    before = path.read_bytes()
    prune(path, tmp_path / "pruned.pt", KEPT)
    prune(tmp_path / "bundle", tmp_path / "pruned", KEPT)
    export(tmp_path / "pruned.pt", data, Pieces(pieces), tmp_path / "exported")
    for name in ("model", "experts.encoder", "experts.decoder"):
        one, other = (
            map_file(tmp_path / x / f"{name}.safetensors") for x in ("pruned", "exported")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    one, other = (Translator.load(tmp_path / name) for name in ("pruned", "exported"))
    found = [[x.to_dict() for x in model.translate(SENTENCES)] for model in (one, other)]
    assert found[0] == found[1]
    assert path.read_bytes() == before


def test_layers_may_keep_different_numbers(tmp_path):
    path, data, pieces, _ = make_checkpoint(tmp_path)
    kept = {"encoder": [0, 1, 2, 4, 5], "decoder": [3, 4]}
    found = prune(path, tmp_path / "pruned.pt", kept)
    assert [one.moe.num_experts for one in found.layers.values()] == [5, 2]
    network = read_network(tmp_path / "pruned.pt", load_checkpoint(tmp_path / "pruned.pt"))
    assert (network.config.moe.num_experts, network.config.decoder_num_experts) == (5, 2)
    export(tmp_path / "pruned.pt", data, Pieces(pieces), tmp_path / "bundle")
    translator = Translator.load(tmp_path / "bundle")
    assert {s: one.config.num_experts for s, one in translator.moe_layers.items()} == {
        "encoder": 5,
        "decoder": 2,
    }
    assert translator.translate(SENTENCES)
    # If both layers are then pruned to the same number, the decoder needs no option of its own.
    found = prune(
        tmp_path / "pruned.pt", tmp_path / "twice.pt", {"encoder": [0, 1], "decoder": [0, 1]}
    )
    assert found.network == replace(GNMT, moe=replace(GNMT.moe, num_experts=2))


def test_experts_in_files_are_read(tmp_path):
    path, *_ = make_checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)
    names = [name for name in state["model"] if ".experts." in name]
    state["extra_state"] = {EXPERT_NAMES: dict(enumerate(names))}
    torch.save(state, path)
    split(path, tmp_path / "parts" / "checkpoint.pt", 3)
    found = prune(tmp_path / "parts" / "checkpoint.pt", tmp_path / "pruned.pt", KEPT)
    assert torch.equal(
        found.layers["encoder"].experts["weight_in"], state["model"][names[0]][KEPT["encoder"]]
    )
    assert found.state["extra_state"]["resized"] == ["pruned"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_weights_of_a_bundle_are_not_rounded_again(tmp_path, dtype):
    folder, _ = make_bundle(tmp_path, dtype=dtype)
    before = map_file(folder / "experts.decoder.safetensors")
    prune(folder, tmp_path / "pruned", KEPT)
    after = map_file(tmp_path / "pruned" / "experts.decoder.safetensors")
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value[KEPT["decoder"]]), name
    assert Translator.load(tmp_path / "pruned").translate(SENTENCES)


def test_the_card_says_what_was_changed(tmp_path):
    folder, _ = make_bundle(tmp_path)
    prune(folder, tmp_path / "pruned", KEPT)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert card.endswith("\n## Changed after training\n\npruned\n")
    assert (
        json.loads((tmp_path / "pruned/config.json").read_text())["network"]["moe"]["num_experts"]
        == 3
    )


def test_a_language_model_is_pruned(tmp_path):
    folder, _ = make_bundle(tmp_path, LM)
    prune(folder, tmp_path / "pruned", {"decoder": [0, 3]})
    model = LanguageModel.load(tmp_path / "pruned")
    assert model.moe_layers["decoder"].config.num_experts == 2
    assert model.score(SENTENCES)[0].log_prob < 0


def test_an_upcycled_bundle_translates_like_the_dense_one(tmp_path):
    folder, _ = make_bundle(tmp_path, DENSE)
    model = read_model(folder)
    model.write(tmp_path / "moe", {s: upcycle(x, 5, 2) for s, x in model.layers.items()}, "grown")
    dense, grown = Translator.load(folder), Translator.load(tmp_path / "moe")
    assert grown.moe_layers["decoder"].config.num_experts == 5
    one, other = (x.score(SENTENCES, SENTENCES) for x in (dense, grown))
    for before, after in zip(one, other, strict=True):
        assert after.target.log_probs == pytest.approx(before.target.log_probs, abs=1e-5)


def test_a_model_without_experts_is_refused(tmp_path):
    path, *_ = make_checkpoint(tmp_path, replace(GNMT, moe=None))
    with pytest.raises(ValueError, match="has no MoE layers, so it has no experts to change"):
        read_model(path)
    with pytest.raises(ValueError, match="does not exist|no such file|missing"):
        read_model(tmp_path / "nothing.pt")


def test_an_existing_output_is_not_replaced(tmp_path):
    folder, _ = make_bundle(tmp_path)
    model = read_model(folder)
    with pytest.raises(ValueError, match="--overwrite"):
        model.write(folder, model.layers, "")
    with pytest.raises(ValueError, match="is the model itself"):
        model.write(folder, model.layers, "", is_overwritten=True)
    path, *_ = make_checkpoint(tmp_path / "checkpoint")
    before, model_of_file = path.read_bytes(), read_model(path)
    with pytest.raises(ValueError, match="is the model itself"):
        model_of_file.write(path, model_of_file.layers, "", is_overwritten=True)
    assert path.read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary").write_text("dear diary")
    with pytest.raises(ValueError, match="not a bundle"):
        model.write(other, model.layers, "", is_overwritten=True)
    assert (other / "diary").read_text() == "dear diary"


def test_a_damaged_bundle_is_not_copied(tmp_path):
    folder, _ = make_bundle(tmp_path)
    path = folder / "experts.decoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="altered"):
        read_model(folder)


def test_the_loss_of_an_upcycled_network_is_that_of_the_dense_one(tmp_path):
    path, _, _, dense = make_checkpoint(tmp_path, DENSE)
    model = read_model(path)
    layers = {side: upcycle(layer, 5, 2) for side, layer in model.layers.items()}
    model.write(tmp_path / "moe.pt", layers, "grown")
    grown = make_networks(replace(DENSE, moe=layers["encoder"].moe), len(dense["output"].weight))
    state = load_checkpoint(tmp_path / "moe.pt")["model"]
    for side in ("encoder", "decoder"):
        prefix = f"{side}.network."
        own = {name.removeprefix(prefix): x for name, x in state.items() if prefix in name}
        grown[side].load_state_dict(own)
    grown["output"] = dense["output"]
    assert loss_of(grown) == pytest.approx(loss_of(dense), abs=1e-9)


def loss_of(networks: dict) -> float:
    """Return the training loss per token of random sentences, in float64."""
    for network in networks.values():
        network.double().train()
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(4, 30, (3, 7), generator=generator) for _ in range(2))
    encoded = networks["encoder"](source, torch.zeros(3, 7, dtype=torch.bool))
    decoded = networks["decoder"](target[:, :-1], encoded)
    logits = networks["output"](decoded.features)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()).item()
