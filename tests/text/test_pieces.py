import hashlib
import itertools
import math
import os
import random
import unicodedata

import pytest
from click.testing import CliRunner

from nmt_moe.cli import main
from nmt_moe.text import pieces
from nmt_moe.text.lines import read_lines

# fmt: off
WORDS = [
    "garden", "winter", "bottle", "morning", "station", "yellow", "captain", "window", "forest",
    "carpet", "number", "silver", "market", "hunter", "player", "mountain", "letter", "corner",
]
# fmt: on
LINES = [f"the {a} of the {b} and a {a}" for a, b in zip(WORDS, reversed(WORDS), strict=True)]


def run(*arguments, **options):
    return CliRunner().invoke(main, ["pieces", *map(str, arguments)], **options)


def encode(path, model, **options):
    return list(pieces.encode(read_lines(path), pieces.load(model), **options))


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


def test_the_dictionary_has_every_piece_except_the_three_that_fairseq_adds(model, tmp_path):
    entries = [line.split(" ")[0] for line in (tmp_path / "dict.txt").read_text().splitlines()]
    assert len(entries) == 40 - 3
    assert not {"<unk>", "<s>", "</s>"} & set(entries)
    used = {piece for line in encode(tmp_path / "train.en", model) for piece in line.split()}
    assert used <= set(entries)


def test_the_rarest_characters_are_left_out_below_full_coverage(tmp_path):
    path = tmp_path / "train.en"
    path.write_text("".join(line + "\n" for line in [*LINES, "a snowman ☃"]), encoding="utf-8")
    entries = {}
    for coverage in (1.0, 0.99):
        dictionary = tmp_path / f"dict.{coverage}"
        pieces.train(
            [path],
            tmp_path / "spm",
            dictionary,
            40,
            hard_vocab_limit=False,
            character_coverage=coverage,
        )
        entries[coverage] = dictionary.read_text(encoding="utf-8")
    assert "☃" in entries[1.0]
    assert "☃" not in entries[0.99]
    assert "e 1\n" in entries[0.99]


def test_pieces_join_to_the_text(model, text):
    assert [join(line) for line in encode(text, model)] == LINES


def test_samples_repeat_the_text_with_other_cuts(model, text):
    encoded = encode(text, model, samples=3, alpha=0.1)
    assert [join(line) for line in encoded] == LINES * 4
    assert encoded[: len(LINES)] == encode(text, model)
    assert len(set(encoded)) > len(LINES)


def test_the_same_seed_gives_the_same_cuts(model, text):
    command = ["encode", "--model", model, "--samples", 2, "--inputs", text]
    first, second = (run(*command).stdout for _ in range(2))
    assert first == second
    assert first != run(*command, "--seed", 2).stdout


def test_each_of_several_texts_is_cut_with_its_own_seed(model, text, tmp_path):
    outputs = [tmp_path / "one", tmp_path / "two"]
    flags = ["--samples", 2, "--seed", 4, "--inputs", text, text, "--outputs", *outputs]
    assert run("encode", "--model", model, *flags).exit_code == 0
    for seed, output in zip((4, 5), outputs, strict=True):
        assert list(read_lines(output)) == encode(text, model, samples=2, seed=seed)
    done = run("encode", "--model", model, "--inputs", text, text, "--outputs", outputs[0])
    assert "`--outputs` must name a file for each input (in total 2), but names 1." in done.stderr


def test_decoding_undoes_encoding_from_standard_input(model, text):
    cut = run("encode", "--model", model, "--input", text).stdout
    assert run("decode", "--model", model, input=cut).stdout.splitlines() == LINES
    assert "U+0007" in run("decode", "--model", model, input="a\x07b\n").stderr


def test_text_that_is_already_cut_causes_a_warning(model, text, caplog):
    run("encode", "--model", model, input=run("encode", "--model", model, "--input", text).stdout)
    assert "already been split into pieces?" in caplog.text


def test_a_more_probable_cut_is_drawn_more_often_by_the_factor_that_alpha_gives(model):
    sampler = pieces.WordSampler(pieces.load(model), alpha=0.1, seed=1)
    cuts, cumulative_weights = sampler.find_cuts("▁letter")
    assert len(cuts) > 1
    probabilities = [math.exp(0.1 * sampler.log_probability(cut.split())) for cut in cuts]
    shares = [weight / cumulative_weights[-1] for weight in cumulative_weights]
    total = sum(probabilities)
    assert shares == pytest.approx([p / total for p in itertools.accumulate(probabilities)])
    # In 4,000 draws, three standard deviations of a share are at most
    # 3 * sqrt(0.25 / 4000) = 0.024.
    share = sum(sampler.cut("▁letter") == cuts[0] for _ in range(4000)) / 4000
    assert share == pytest.approx(probabilities[0] / sum(probabilities), abs=0.024)


def test_text_outside_the_vocabulary_keeps_its_place(model, tmp_path):
    odd = tmp_path / "odd"
    odd.write_text("  garden   €€ \n\n東京 winter\n", encoding="utf-8")
    encoded = encode(odd, model, samples=1)
    assert [join(line) for line in encoded] == ["garden €€", "", "東京 winter"] * 2


def test_too_many_pieces_for_the_text_are_refused_or_reduced(text, tmp_path):
    with pytest.raises(ValueError, match=r"`--vocab-size` 4000 pieces .*value <= \d+"):
        pieces.train([text], tmp_path / "m", tmp_path / "d", 4000)
    assert not (tmp_path / "m").exists()
    done = pieces.train([text], tmp_path / "m", tmp_path / "d", 4000, hard_vocab_limit=False)
    assert 10 < done.num_pieces < 4000


def test_lines_that_sentencepiece_leaves_out_are_counted(text, tmp_path):
    with text.open("a", encoding="utf-8") as file:
        file.write("ж" * 2097 + "\n" + "ф" * 2096 + "\nq\u2585q\n")
    flags = ["--model", tmp_path / "m", "--dictionary", tmp_path / "d", "--vocab-size", 40]
    done = run("train", "--inputs", text, *flags, "--no-hard-vocab-limit")
    assert "lines left out of training: 1 of more than 4192 bytes\n" in done.stderr
    assert "lines left out of training: 1 with \u2585, which sentencepiece" in done.stderr
    entries = (tmp_path / "d").read_text(encoding="utf-8")
    assert ("ж" in entries, "ф" in entries) == (False, True)
    run("train", "--inputs", text, *flags, "--max-sentence-length", 5000)
    assert "ж" in (tmp_path / "d").read_text(encoding="utf-8")


NORMALIZED = {
    "nmt_nfkc": "A... TM 1/2 é",
    "nfkc": "A... TM 1\u20442 é",
    "nfc": "A… ™ ½ é",
    "identity": "A… ™ ½ e\u0301",
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_text_is_normalised_as_requested(text, tmp_path, name):
    flags = ["--vocab-size", 40, "--model", tmp_path / "m", "--dictionary", tmp_path / "d"]
    done = run("train", "--inputs", text, *flags, "--normalization", name)
    assert done.stdout == f"37 pieces, unigram, normalization {name}\n"
    joined = "".join(pieces.load(tmp_path / "m").encode("A… ™ ½ e\u0301", out_type=str))
    found = joined.replace("▁", " ").strip()
    assert found.replace("\u2044", "/") == NORMALIZED[name].replace("\u2044", "/")


def test_nfc_agrees_with_unicode(text, tmp_path):
    pieces.train([text], tmp_path / "m", tmp_path / "d", 40, normalization="nfc")
    processor = pieces.load(tmp_path / "m")
    generator = random.Random(1)
    blocks = [*range(0xC0, 0x250), *range(0x1E00, 0x1F00), *range(0xAC00, 0xD7A4)]
    for form in ("NFC", "NFD"):
        for _ in range(300):
            word = "".join(map(chr, generator.choices(blocks, k=5)))
            found = "".join(processor.encode(unicodedata.normalize(form, word), out_type=str))
            assert found.removeprefix("▁") == unicodedata.normalize("NFC", word)


def test_a_text_that_is_not_utf8_is_named_with_its_line(text, tmp_path):
    text.write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"train\.en`, line 2 is not valid UTF-8"):
        pieces.train([text], tmp_path / "m", tmp_path / "d", 40)
    assert not list(tmp_path.glob("m*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vocab_size": 0}, "`--vocab-size` must be from 4 to"),
        ({"character_coverage": math.nan}, "`--character-coverage` must be from 0.98 to 1"),
        ({"max_sentence_bytes": 0}, "`--max-sentence-length` must be from 1 to"),
        ({"max_sentence_bytes": 5}, "cannot learn .* too little text"),
        ({"dictionary": "m"}, "`.*m` is named twice"),
        ({"model": "train.en"}, r"`.*train\.en` is named twice"),
        ({"dictionary": "."}, "must be a file to write, but is a folder"),
    ],
)
def test_impossible_settings_are_named_and_nothing_is_written(text, tmp_path, flags, message):
    wanted = {"model": "m", "dictionary": "d", "vocab_size": 40} | flags
    paths = {name: tmp_path / wanted.pop(name) for name in ("model", "dictionary")}
    with pytest.raises(ValueError, match=message):
        pieces.train([text], **paths, **wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["train.en"]
    assert text.read_text().splitlines() == LINES


@pytest.mark.parametrize("flags", [["--samples", -1], ["--samples", 1, "--alpha", "nan"]])
def test_samples_that_cannot_be_drawn_are_named(model, text, tmp_path, flags):
    outputs = ["--outputs", tmp_path / "cut"]
    done = run("encode", "--model", model, "--inputs", text, *outputs, *flags)
    assert done.exit_code == 1
    assert f"`{flags[-2]}` must be" in done.stderr
    assert not list(tmp_path.glob("cut*"))
    assert run("encode", "--model", model, "--inputs", text, "--outputs", text).exit_code == 1
    assert text.read_text().splitlines() == LINES


def test_text_that_is_not_in_pieces_causes_a_warning(model, text, caplog):
    run("decode", "--model", model, "--input", text)
    assert "Is this plain text instead of pieces?" in caplog.text


def test_a_missing_file_or_folder_is_named(text, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        pieces.train([tmp_path / "absent"], tmp_path / "m", tmp_path / "d", 40)
    with pytest.raises(FileNotFoundError, match="no-folder/m"):
        pieces.train([text], tmp_path / "no-folder/m", tmp_path / "d", 40)
    with pytest.raises(FileNotFoundError, match="absent.model"):
        pieces.load(tmp_path / "absent.model")


ODD_SPACES = "\t\v\f\x85\xa0\u2028\u3000"


@pytest.mark.parametrize("name", pieces.NORMALIZATIONS)
def test_no_piece_holds_white_space_or_a_mark_of_fairseq(text, tmp_path, name):
    lines = [f"a{space}<pad> <s>b</s> <unk>" for space in ODD_SPACES] * 40
    text.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    flags = {"normalization": name, "model_type": "bpe", "hard_vocab_limit": False}
    pieces.train([text], tmp_path / "m", tmp_path / "d", 200, **flags)
    rows = (tmp_path / "d").read_text(encoding="utf-8").split("\n")[:-1]
    learnt = {row.removesuffix(" 1") for row in rows}
    assert "pad" in learnt
    assert not {"<pad>", "<s>", "</s>", "<unk>"} & {piece.strip("▁") for piece in learnt}
    assert not any(piece.split() != [piece] for piece in learnt)
    for line in encode(text, tmp_path / "m"):
        assert join(line) == "a <pad> <s>b</s> <unk>"


def test_a_flipped_bit_of_a_model_is_noticed_wherever_it_is(model, text):
    content, digests = model.read_bytes(), model.with_name("spm.model.sha256")
    match = r"spm\.model` is damaged: .* `nmt-moe pieces train` stored"
    assert digests.read_text() == f"{hashlib.sha256(content).hexdigest()}  spm.model\n"
    for place in range(0, len(content), len(content) // 20):
        model.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        os.utime(model, (place, place))  # a copy may have any time stamp
        with pytest.raises(ValueError, match=match):
            pieces.load(model)
    model.write_bytes(content)
    pieces.load(model)
    # A model that was trained again, or that has no digest, is accepted.
    pieces.train([text], model, model.with_name("dict.txt"), 44)
    pieces.load(model)
    digests.unlink()
    model.write_bytes(content)
    pieces.load(model)


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_model_gives_one_message(model, text, share):
    content = model.read_bytes()
    model.write_bytes(content[: int(len(content) * share)])
    model.with_name("spm.model.sha256").unlink()
    done = run("encode", "--model", model, "--input", text)
    assert done.exit_code == 1
    assert "sentencepiece model" in done.stderr
