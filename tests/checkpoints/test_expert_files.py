"""Experts are read from expert files exactly as they were written, and errors name the file."""

import argparse
import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmt_moe.checkpoints import (
    EXPERT_NAMES,
    MANIFEST,
    load_checkpoint,
    read_checkpoint,
    remove_unused_files,
    restore_experts,
    write_whole,
)
from nmt_moe.checkpoints.expert_files import write_expert_file
from nmt_moe.checkpoints.manifest import make_manifest
from nmt_moe.checkpoints.reshape import split_checkpoint

EXPERTS = 6
NAME = "moe.weight_in"


def whole_state():
    generator = torch.Generator().manual_seed(1)
    return {
        "model": {"embed": torch.ones(3), NAME: torch.randn(EXPERTS, 2, 4, generator=generator)},
        "extra_state": {EXPERT_NAMES: {1: NAME}},
        "last_optimizer_state": {
            "state": {
                0: {"step": 3, "exp_avg": torch.zeros(3)},
                1: {"step": 3, "exp_avg": torch.randn(EXPERTS, 2, 4, generator=generator)},
            }
        },
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    split_checkpoint(whole_state(), path, 3)
    return path


def read(path):
    return torch.load(path, weights_only=True)


def restored(path, **options):
    state = read(path)
    restore_experts(path, state, **options)
    return state


def test_split_and_restored_experts_are_unchanged(path):
    state, expected = restored(path), whole_state()
    assert MANIFEST not in state
    assert torch.equal(state["model"][NAME], expected["model"][NAME])
    values = state["last_optimizer_state"]["state"][1]
    assert values["step"] == 3
    expected_values = expected["last_optimizer_state"]["state"][1]
    assert torch.equal(values["exp_avg"], expected_values["exp_avg"])
    assert NAME not in read(path)["model"]


@pytest.mark.parametrize("states", [{}, {1: {"step": 3}}], ids=["before any update", "plain SGD"])
def test_experts_without_optimizer_state_are_restored(states, tmp_path):
    state = whole_state()
    state["last_optimizer_state"]["state"] = states
    split_checkpoint(state, tmp_path / "checkpoint_last.pt", 3)
    found = restored(tmp_path / "checkpoint_last.pt")
    assert torch.equal(found["model"][NAME], whole_state()["model"][NAME])


@pytest.mark.parametrize("owned", [slice(0, 3), slice(1, 5), slice(5, 6)])
def test_any_range_is_read_from_the_files_that_hold_it(path, owned):
    state = restored(path, owned=owned)
    assert torch.equal(state["model"][NAME], whole_state()["model"][NAME][owned])


def test_a_range_needs_only_its_own_files(path):
    (path.parent / read(path)[MANIFEST]["files"][0]["name"]).unlink()
    restored(path, owned=slice(2, 6))
    with pytest.raises(ValueError, match=r"experts 0 to 1 of `checkpoint_la.*is missing"):
        restored(path)


def test_a_damaged_file_is_named(path):
    part = path.parent / read(path)[MANIFEST]["files"][1]["name"]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`{part}`, which contains experts 2 to 3 .* is damaged"):
        restored(path)
    part.write_bytes(content[:100])
    with pytest.raises(ValueError, match="is damaged"):
        restored(path)


def test_a_file_from_another_save_is_named(path, tmp_path):
    (tmp_path / "other").mkdir()
    split_checkpoint(whole_state(), tmp_path / "other/checkpoint_last.pt", 3)
    stranger = next((tmp_path / "other").glob("experts-*-0-2.pt"))
    part = path.parent / read(path)[MANIFEST]["files"][0]["name"]
    part.write_bytes(stranger.read_bytes())
    with pytest.raises(ValueError, match="comes from the save"):
        restored(path)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 2], "has no file for experts 2 to 3"),
        ([0, 1, 1, 2], "has more than one file for experts 2 to 3"),
        ([0, 1], "has no file for experts 4 and higher"),
    ],
)
def test_a_manifest_that_lacks_or_repeats_experts_is_refused(path, kept, message):
    state = read(path)
    files = state[MANIFEST]["files"]
    state[MANIFEST]["files"] = [files[index] for index in kept]
    with pytest.raises(ValueError, match=message):
        restore_experts(path, state)


def test_reading_does_not_change_what_the_safe_loader_allows(path):
    before = torch.serialization.get_safe_globals()
    try:
        for allowed in ([], [argparse.Namespace]):
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)
            read_checkpoint(path)
            remove_unused_files(path.parent)
            assert torch.serialization.get_safe_globals() == allowed
    finally:
        torch.serialization.add_safe_globals(before)


def test_only_files_that_no_checkpoint_needs_are_deleted(path):
    folder = path.parent
    used = set(folder.glob("experts-*"))
    for start in (0, 3):  # from a save interrupted before its checkpoint was written
        write_expert_file(folder, "abandoned", slice(start, start + 3), {}, {})
    (folder / "experts-cut-0-3.pt.tmp").write_bytes(b"half")
    path.rename(folder / "checkpoint_best.pt")
    remove_unused_files(folder)
    assert set(folder.glob("experts-*")) == used


def test_files_that_a_damaged_checkpoint_names_are_kept_and_others_are_deleted(path):
    used = set(path.parent.glob("experts-*"))
    path.write_bytes(path.read_bytes()[:-100])
    write_expert_file(path.parent, "unused", slice(0, 6), {}, {})
    remove_unused_files(path.parent)
    assert set(path.parent.glob("experts-*")) == used


def test_an_unfinished_file_is_replaced_and_no_link_is_followed(path, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("precious")
    path.with_name(f"{path.name}.tmp").symlink_to(other)
    write_whole(path, {"model": {}})
    assert other.read_text() == "precious"
    assert read_checkpoint(path) == {"model": {}}


def rewrite(path, change):
    """Change the contents of the second expert file, and its entry in the manifest."""
    state = read(path)
    entry = state[MANIFEST]["files"][1]
    part = path.parent / entry["name"]
    content = torch.load(part, weights_only=True)
    change(content, entry, state)
    torch.save(content, part)
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    entry.update(bytes=part.stat().st_size, sha256=digest)
    torch.save(state, path)


CHANGES = {
    "one row for two experts": lambda part, *_: part["model"].update({NAME: torch.ones(1, 2, 4)}),
    "too many rows": lambda part, *_: part["model"].update({NAME: torch.ones(3, 2, 4)}),
    "a tensor is missing": lambda part, *_: part["model"].clear(),
    "another dtype": lambda part, *_: part["model"].update({NAME: torch.ones(2, 2, 4).half()}),
    "another shape": lambda part, *_: part["model"].update({NAME: torch.ones(2, 4, 2)}),
    "a dense name": lambda part, *_: part["model"].update(embed=torch.ones(2)),
    "no optimizer state": lambda part, *_: part.update(optimizer=None),
    "another range": lambda part, *_: part.update(start=0),
    "NaN": lambda part, *_: part["model"][NAME].fill_(torch.nan),
    "NaN in the optimizer": lambda part, *_: part["optimizer"][1]["exp_avg"].fill_(torch.nan),
    "an empty range": lambda _, entry, __: entry.update(stop=entry["start"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_file_that_does_not_hold_its_experts_is_refused_even_if_its_digest_matches(path, change):
    rewrite(path, change)
    with pytest.raises(ValueError, match=r"checkpoint_last\.pt|experts-"):
        load_checkpoint(path)


def test_an_unchanged_file_with_a_new_digest_is_accepted(path):
    rewrite(path, lambda *_: None)
    assert torch.equal(load_checkpoint(path)["model"][NAME], whole_state()["model"][NAME])


@pytest.mark.parametrize("precision", ["bf16", "memory_efficient_fp16"])
def test_experts_trained_in_half_precision_are_read_back_as_trained(path, precision):
    state = read(path)
    for entry in state[MANIFEST]["files"]:
        part = path.parent / entry["name"]
        content = torch.load(part, weights_only=True)
        content["model"][NAME] = content["model"][NAME].half()
        torch.save(content, part)
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        entry.update(bytes=part.stat().st_size, sha256=digest)
    torch.save(state, path)
    with pytest.raises(ValueError, match="is torch.float16, unlike"):
        load_checkpoint(path)
    torch.save({**state, "cfg": {"common": {precision: True}}}, path)
    expected = whole_state()["model"][NAME].half().float()  # fairseq stores float32
    assert torch.equal(load_checkpoint(path)["model"][NAME], expected)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("\0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=9,
)


MANIFESTS = JSON | st.fixed_dictionaries(
    {
        "save_id": st.just("1f") | JSON,
        "num_experts": st.sampled_from([0, 6, 10**12, -1]) | JSON,
        "files": JSON | st.lists(st.dictionaries(st.sampled_from(["name", "start"]), JSON)),
    }
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(manifest=MANIFESTS)
def test_any_malformed_manifest_raises_a_value_error_that_names_the_checkpoint(manifest):
    state = {**whole_state(), MANIFEST: manifest}
    if manifest is None:
        return
    with pytest.raises(ValueError, match="checkpoint"):
        restore_experts(Path("checkpoint.pt"), state)


def test_a_manifest_of_a_million_files_is_refused_at_once(path):
    state = read(path)
    state[MANIFEST]["files"] *= 400_000
    with pytest.raises(ValueError, match=r"more expert files \(\d+\) than experts \(6\)"):
        restore_experts(path, state)


def test_an_interrupted_write_keeps_the_old_file(path, monkeypatch):
    old = path.read_bytes()

    def save_half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, {"model": {}})
    assert path.read_bytes() == old


def test_files_are_sorted_by_their_experts(tmp_path):
    entries = [
        write_expert_file(tmp_path, "id", slice(start, start + 2), {}, {}) for start in (2, 0)
    ]
    manifest = make_manifest("id", entries)
    assert [entry["start"] for entry in manifest["files"]] == [0, 2]
    assert manifest["num_experts"] == 4


def test_a_checkpoint_that_names_no_experts_is_not_split(tmp_path):
    state = whole_state()
    del state["extra_state"][EXPERT_NAMES]
    with pytest.raises(ValueError, match="does not say which of its parameters are experts"):
        split_checkpoint(state, tmp_path / "checkpoint.pt", 2)
    with pytest.raises(ValueError, match="`--files` must .*6.*but is 4"):
        split_checkpoint(whole_state(), tmp_path / "checkpoint.pt", 4)
