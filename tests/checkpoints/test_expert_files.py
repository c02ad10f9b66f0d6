"""Files of experts: what is written comes back, and what is wrong is named."""

import argparse

import pytest
import torch

from nmt_moe.checkpoints.expert_files import (
    MANIFEST,
    PLACES,
    make_manifest,
    read_checkpoint,
    remove_unused_files,
    restore_experts,
    split_checkpoint,
    write_expert_file,
    write_whole,
)

EXPERTS = 6
NAME = "moe.weight_in"


def whole_state():
    generator = torch.Generator().manual_seed(1)
    return {
        "model": {"embed": torch.ones(3), NAME: torch.randn(EXPERTS, 2, 4, generator=generator)},
        "extra_state": {PLACES: {1: NAME}},
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


def test_split_and_restored_is_what_it_was(path):
    state, expected = restored(path), whole_state()
    assert MANIFEST not in state
    assert torch.equal(state["model"][NAME], expected["model"][NAME])
    values = state["last_optimizer_state"]["state"][1]
    assert values["step"] == 3
    expected_values = expected["last_optimizer_state"]["state"][1]
    assert torch.equal(values["exp_avg"], expected_values["exp_avg"])
    assert NAME not in read(path)["model"]


@pytest.mark.parametrize("owned", [slice(0, 3), slice(1, 5), slice(5, 6)])
def test_any_range_comes_from_the_files_that_have_it(path, owned):
    state = restored(path, owned=owned)
    assert torch.equal(state["model"][NAME], whole_state()["model"][NAME][owned])


def test_a_range_needs_only_its_own_files(path):
    (path.parent / read(path)[MANIFEST]["files"][0]["name"]).unlink()
    restored(path, owned=slice(2, 6))
    with pytest.raises(ValueError, match=r"is missing: it holds experts 0 to 1 of `checkpoint_la"):
        restored(path)


def test_a_damaged_file_is_named(path):
    part = path.parent / read(path)[MANIFEST]["files"][1]["name"]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`{part}` is damaged: .* experts 2 to 3"):
        restored(path)
    part.write_bytes(content[:100])
    with pytest.raises(ValueError, match="is damaged"):
        restored(path)


def test_a_file_of_another_save_is_named(path, tmp_path):
    (tmp_path / "other").mkdir()
    split_checkpoint(whole_state(), tmp_path / "other/checkpoint_last.pt", 3)
    stranger = next((tmp_path / "other").glob("experts-*-0-2.pt"))
    part = path.parent / read(path)[MANIFEST]["files"][0]["name"]
    part.write_bytes(stranger.read_bytes())
    with pytest.raises(ValueError, match="is of another save"):
        restored(path)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 2], "has experts 2 to 3 in no file"),
        ([0, 1, 1, 2], "has experts 2 to 3 in more than one file"),
        ([0, 1], "has experts from 4 on in no file"),
    ],
)
def test_a_manifest_that_lacks_or_repeats_experts_is_refused(path, kept, message):
    state = read(path)
    files = state[MANIFEST]["files"]
    state[MANIFEST]["files"] = [files[place] for place in kept]
    with pytest.raises(ValueError, match=message):
        restore_experts(path, state)


def test_reading_leaves_what_the_safe_loader_allows(path):
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
    for start in (0, 3):  # of a save that was cut off before its checkpoint
        write_expert_file(folder, "abandoned", slice(start, start + 3), {}, {})
    (folder / "experts-cut-0-3.pt.tmp").write_bytes(b"half")
    path.rename(folder / "checkpoint_best.pt")
    remove_unused_files(folder)
    assert set(folder.glob("experts-*")) == used


def test_nothing_is_deleted_beside_a_checkpoint_that_cannot_be_read(path):
    (path.parent / "checkpoint_best.pt").write_bytes(b"damaged")
    write_expert_file(path.parent, "unused", slice(0, 6), {}, {})
    before = set(path.parent.iterdir())
    with pytest.raises(ValueError, match=r"`.*checkpoint_best.pt` cannot be read"):
        remove_unused_files(path.parent)
    assert set(path.parent.iterdir()) == before


def test_a_write_that_is_cut_off_leaves_the_old_file(path, monkeypatch):
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
    del state["extra_state"][PLACES]
    with pytest.raises(ValueError, match="does not say which of its parameters are experts"):
        split_checkpoint(state, tmp_path / "checkpoint.pt", 2)
    with pytest.raises(ValueError, match="`num_experts` must be a multiple of `--files`, 4"):
        split_checkpoint(whole_state(), tmp_path / "checkpoint.pt", 4)
