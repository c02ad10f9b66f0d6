import itertools
import math
import subprocess
import sys

import pytest

from tools import pieces

# fmt: off
WORDS = [
    "garden", "winter", "bottle", "morning", "station", "yellow", "captain", "window", "forest",
    "carpet", "number", "silver", "market", "hunter", "player", "mountain", "letter", "corner",
]
# fmt: on
LINES = [f"the {a} of the {b} and a {a}" for a, b in zip(WORDS, reversed(WORDS), strict=True)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "train.en"
    path.write_text("".join(line + "\n" for line in LINES), encoding="utf-8")
    return path


@pytest.fixture
def model(text, tmp_path):
    pieces.train([text], tmp_path / "spm.model", tmp_path / "dict.txt", 40)
    return tmp_path / "spm.model"


def join(line):
    return line.replace(" ", "").replace("▁", " ").strip()


def test_the_dictionary_has_every_piece_but_the_three_that_fairseq_adds_itself(model, tmp_path):
    entries = [line.split(" ")[0] for line in (tmp_path / "dict.txt").read_text().splitlines()]
    assert len(entries) == 40 - 3
    assert not {"<unk>", "<s>", "</s>"} & set(entries)
    used = {piece for line in pieces.encode(tmp_path / "train.en", model) for piece in line.split()}
    assert used <= set(entries)


def test_the_rarest_characters_are_left_out_below_full_coverage(tmp_path):
    path = tmp_path / "train.en"
    path.write_text("".join(line + "\n" for line in [*LINES, "a snowman ☃"]), encoding="utf-8")
    entries = {}
    for coverage in (1.0, 0.99):
        dictionary = tmp_path / f"dict.{coverage}"
        pieces.train(
            [path], tmp_path / "spm", dictionary, 40, at_most=True, character_coverage=coverage
        )
        entries[coverage] = dictionary.read_text(encoding="utf-8")
    assert "☃" in entries[1.0]
    assert "☃" not in entries[0.99]
    assert "e 1\n" in entries[0.99]


def test_pieces_join_to_the_text(model, text):
    assert [join(line) for line in pieces.encode(text, model)] == LINES


def test_samples_repeat_the_text_with_other_cuts(model, text):
    encoded = list(pieces.encode(text, model, samples=3, alpha=0.1))
    assert [join(line) for line in encoded] == LINES * 4
    assert encoded[: len(LINES)] == list(pieces.encode(text, model))
    assert len(set(encoded)) > len(LINES)


def test_the_same_seed_gives_the_same_cuts(model, text):
    command = [sys.executable, pieces.__file__, "encode", "--model", model, "--samples", "2", text]
    first, second = (subprocess.run(command, capture_output=True).stdout for _ in range(2))
    other = subprocess.run([*command, "--seed", "2"], capture_output=True).stdout
    assert first == second
    assert first != other


def test_a_likelier_cut_is_drawn_as_much_more_often_as_alpha_says(model):
    sampler = pieces.WordSampler(pieces.load(model), alpha=0.1, seed=1)
    cuts, cumulative_weights = sampler.find_cuts("▁letter")
    assert len(cuts) > 1
    probabilities = [math.exp(0.1 * sampler.log_probability(cut.split())) for cut in cuts]
    assert cumulative_weights == pytest.approx(list(itertools.accumulate(probabilities)))
    # 4,000 draws: three standard deviations of a share are below 3 * sqrt(0.25 / 4000) = 0.024
    share = sum(sampler.cut("▁letter") == cuts[0] for _ in range(4000)) / 4000
    assert share == pytest.approx(probabilities[0] / sum(probabilities), abs=0.024)


def test_text_outside_the_vocabulary_keeps_its_place(model, tmp_path):
    odd = tmp_path / "odd"
    odd.write_text("  garden   €€ \n\n東京 winter\n", encoding="utf-8")
    encoded = list(pieces.encode(odd, model, samples=1))
    assert [join(line) for line in encoded] == ["garden €€", "", "東京 winter"] * 2


def test_too_many_pieces_for_the_text_are_refused_or_cut_down(text, tmp_path):
    with pytest.raises(ValueError, match=r"`--vocab-size` 4000 pieces .*value <= \d+"):
        pieces.train([text], tmp_path / "m", tmp_path / "d", 4000)
    assert not (tmp_path / "m").exists()
    assert 10 < pieces.train([text], tmp_path / "m", tmp_path / "d", 4000, at_most=True) < 4000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent: no such file"):
        pieces.train([tmp_path / "absent"], tmp_path / "m", tmp_path / "d", 40)
    with pytest.raises(ValueError, match=r"absent\.model: no such file"):
        list(pieces.encode(tmp_path / "absent", tmp_path / "absent.model"))
