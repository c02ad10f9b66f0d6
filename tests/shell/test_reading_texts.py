"""The lines, words and marks that fairseq's readers find in a text."""

import logging
from pathlib import Path

import pytest
import torch
from fairseq import utils
from fairseq.data import Dictionary, data_utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq.data.indexed_dataset import make_dataset

from nmt_moe import plugin
from nmt_moe.compat import dictionaries
from nmt_moe.text import pieces
from tests.support.commands import call
from tests.support.corpus import preprocess_flags, write_corpus

plugin.register()

ODD_SPACES = "\u0085\u2028\u2029\x0b\x0c"


@pytest.fixture
def own_corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture(autouse=True)
def _warnings_are_repeated():
    dictionaries._warn_of_typed_mark.cache_clear()


def change(path: Path, number: int, line: bytes) -> None:
    """Replace line `number` of a file, counted from 1."""
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines))


def preprocess(corpus: Path, *flags: object) -> str:
    return call("preprocess", *preprocess_flags(corpus, corpus / "data"), *flags).text


def load(corpus: Path, name: str = "train.aa-bb.aa", impl: str = "mmap") -> list[str]:
    """Return the sentences of binarised data."""
    dictionary = Dictionary.load(str(corpus / "data/dict.aa.txt"))
    dataset = make_dataset(str(corpus / "data" / name), impl, dictionary=dictionary)
    return [dictionary.string(dataset[i]) for i in range(len(dataset))]


# Lines


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("impl", ["mmap", "raw"])
def test_sentences_are_the_lines_of_the_text(own_corpus: Path, workers: int, impl: str):
    path = own_corpus / "train.aa"
    change(path, 3, f"ba{ODD_SPACES}de".encode())
    change(path, 4, b"ki \r")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))
    text = preprocess(own_corpus, "--workers", workers, "--dataset-impl", impl)
    assert f"`{path}` begins with a byte order mark" in text
    name = "train.aa-bb" if impl == "raw" else "train.aa-bb.aa"
    if impl == "raw":
        (own_corpus / "data/train.aa-bb.aa").rename(own_corpus / "data/train.aa-bb")
    sentences = load(own_corpus, name, impl)
    assert len(sentences) == 96
    assert sentences[2:4] == ["ba de", "ki"]
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    assert sentences[0] == lines[0]
    assert sentences[4:] == lines[4:]
    words = (own_corpus / "data/dict.aa.txt").read_text()
    assert "\ufeff" not in words


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["train.aa", "train.bb", "valid.aa", "test.bb"])
def test_a_carriage_return_within_a_line_is_named(own_corpus: Path, name: str, workers: int):
    change(own_corpus / name, 3, b"ba\rde")
    with pytest.raises(ValueError, match=rf"{name}`, line 3 contains a carriage return"):
        preprocess(own_corpus, "--workers", workers)
    assert not list((own_corpus / "data").glob("*.bin"))


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"b\x00a", r"U\+0000"), (b"ba\x1cde", r"U\+001C"), (b"ba \xff", "UTF-8")],
)
def test_a_line_that_cannot_be_used_is_named(own_corpus: Path, line: bytes, message: str):
    change(own_corpus / "valid.bb", 12, line)
    with pytest.raises(ValueError, match=rf"valid\.bb`, line 12 .*{message}"):
        preprocess(own_corpus)


@pytest.mark.parametrize("name", ["train.bb", "test.aa"])
def test_an_empty_text_is_refused(own_corpus: Path, name: str):
    (own_corpus / name).write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match=rf"{name}` is empty"):
        preprocess(own_corpus)


def test_uneven_alignments_are_refused(own_corpus: Path):
    (own_corpus / "train.align").write_text("0-0\n")
    with pytest.raises(ValueError, match=r"`.*train\.align` has 1"):
        preprocess(own_corpus, "--align-suffix", "align")


def test_texts_used_only_for_dictionaries_may_have_different_lengths(own_corpus: Path):
    (own_corpus / "train.bb").write_text("ab\n")
    preprocess(own_corpus, "--dict-only")
    assert Dictionary.load(str(own_corpus / "data/dict.bb.txt")).index("ab") == 4


# Words


def test_typed_marks_are_unknown_words(own_corpus: Path):
    change(own_corpus / "train.aa", 1, b"ba </s> be <pad> <s> bi <unk> <2bb>")
    text = preprocess(own_corpus)
    # `<2bb>` is an ordinary word in this corpus, because only multilingual models use it as a mark.
    assert load(own_corpus)[0] == "ba <unk> be <unk> <unk> bi <unk> <2bb>"
    for mark in ("</s>", "<pad>", "<s>"):
        assert text.count(f"the text contains the word `{mark}`") == 1


def test_marks_that_a_model_writes_itself_stay_marks():
    dictionary = Dictionary()
    tokens = dictionary.encode_line("<s> </s>", append_eos=False, add_if_not_exist=False)
    assert tokens.tolist() == [dictionary.bos(), dictionary.eos()]


def test_a_text_with_many_unknown_words_is_named(own_corpus: Path, data: Path):
    (own_corpus / "valid.aa").write_text("ba de\n" * 11 + "new words\n")
    text = preprocess(own_corpus, "--srcdict", data / "dict.aa.txt", "--joined-dictionary")
    share = r"5.6% of the tokens of"
    assert f"{share} `{own_corpus}/valid.aa` are not in the dictionary" in text
    assert "tokens of `" + str(own_corpus / "train.aa") not in text


def test_binarised_data_with_many_unknown_words_are_named(
    own_corpus: Path, caplog: pytest.LogCaptureFixture
):
    (own_corpus / "train.bb").write_text("".join(f"word{i} ab\n" for i in range(96)))
    preprocess(own_corpus, "--thresholdtgt", 2)
    dictionary = Dictionary.load(str(own_corpus / "data/dict.bb.txt"))
    with caplog.at_level(logging.WARNING):
        make_dataset(str(own_corpus / "data/train.aa-bb.bb"), "mmap", dictionary=dictionary)
    assert "33.3% of the tokens of" in caplog.text


# Dictionaries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ba 4\nde\n", "line 2: 'de' is not a word followed by its count"),
        (b"ba 4\nde x\n", "line 2: 'de x' is not a word"),
        (b"ba 4\nde 3\nba 2\n", "line 3: Duplicate word found"),
        (b"ba 4\n 3\n", "line 2: ' 3' is not a word"),
        (b"ba 4\nd\xff 3\n", "line 2 is not valid UTF-8"),
        (b"ba 4\n<pad> 3\n", "line 2: Duplicate word found .*<pad>"),
        (b"", "has no words"),
        (b"\x00" * 90, "line 1: "),
    ],
)
def test_a_damaged_dictionary_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`{path}`.*{message}"):
        Dictionary.load(str(path))


def test_a_dictionary_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "dict.txt"
    path.write_bytes("\ufeffba 4\r\na\u00a0b 3\nba 2 #fairseq:overwrite\n".encode())
    dictionary = Dictionary.load(str(path))
    assert dictionary.symbols[4:] == ["ba", "a\u00a0b", "ba"]


def test_a_damaged_sentencepiece_model_is_named(data: Path, checkpoint: Path, tmp_path: Path):
    (tmp_path / "spm.model").write_bytes(b"no model")
    flags = ["--path", checkpoint, "--cpu", "--bpe", "sentencepiece"]
    flags += ["--sentencepiece-model", tmp_path / "spm.model"]
    with pytest.raises(ValueError, match=r"spm\.model` is not a complete sentencepiece model"):
        call("interactive", data, *flags, stdin=b"ba\n")
    (tmp_path / "spm.model.sha256").write_text(f"{'0' * 64}  spm.model\n")
    with pytest.raises(
        ValueError, match=r"spm\.model` is damaged: it does not match the digest that"
    ):
        call("interactive", data, *flags, stdin=b"ba\n")


def test_fairseqs_pieces_are_those_of_nmt_moe_pieces(corpus: Path, tmp_path: Path):
    model, flags = tmp_path / "spm.model", {"normalization": "identity", "hard_vocab_limit": False}
    pieces.train([corpus / "train.aa"], model, tmp_path / "dict.txt", 40, **flags)
    bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(model)))
    for line in ("ba\u2028de", "ba\xa0 de\tki", " ba"):
        assert [bpe.encode(line)] == list(pieces.encode([line], pieces.load(model)))


def test_a_damaged_dictionary_of_replacements_is_named(tmp_path: Path):
    path = tmp_path / "alignment.txt"
    path.write_text("ba ab\nde\n")
    with pytest.raises(
        ValueError, match=rf"`{path}`, line 2 must be two words, a word and its translation"
    ):
        utils.load_align_dict(str(path))
    path.write_text("ba ab\n")
    assert utils.load_align_dict(str(path)) == {"ba": "ab"}
    assert (utils.load_align_dict(None), utils.load_align_dict("")) == (None, {})


# Binarised data


@pytest.fixture
def own_data(own_corpus: Path) -> Path:
    preprocess(own_corpus, "--joined-dictionary")
    return own_corpus / "data"


def load_train(data: Path, num_words: int | None = None) -> torch.utils.data.Dataset:
    dictionary = Dictionary.load(str(data / "dict.aa.txt"))
    if num_words is not None:
        dictionary.symbols = dictionary.symbols[:num_words]
    return data_utils.load_indexed_dataset(str(data / "train.aa-bb.aa"), dictionary)


@pytest.mark.parametrize("name", ["train.aa-bb.aa.bin", "train.aa-bb.aa.idx", "dict.aa.txt"])
def test_a_flipped_bit_of_binarised_data_is_noticed(own_data: Path, name: str):
    load_train(own_data)
    path = own_data / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`{path}` is damaged"):
        load_train(own_data)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("bin", lambda content: content[:-100], r"sentence #8\d of `.*\.bin` cannot be read"),
        ("bin", lambda content: b"\xff\xff" + content[2:], r"sentence #0 .* has the token 65535"),
        ("idx", lambda content: content[:-100], r"\.idx` is damaged"),
        ("idx", lambda content: content[:30] + b"\xff" * 4 + content[34:], "cannot be read"),
    ],
)
def test_damaged_data_without_digests_are_named(own_data: Path, kind: str, damage, message: str):
    (own_data / "train.aa-bb.aa.sha256").unlink()
    path = own_data / f"train.aa-bb.aa.{kind}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_train(own_data)


def test_data_of_a_larger_dictionary_are_named(own_data: Path):
    with pytest.raises(ValueError, match=r"sentence #\d+ of .* has the token \d+, but .* 20 sym"):
        load_train(own_data, num_words=20)


# Splits


def test_validation_sets_are_accepted_if_all_are_named(own_data: Path):
    for file in own_data.glob("valid.*"):
        file.with_name(file.name.replace("valid", "valid1")).write_bytes(file.read_bytes())
    assert data_utils._find_extra_valid_paths(str(own_data)) == {"valid1"}


def test_a_folder_without_binarised_data_is_named(own_corpus: Path):
    with pytest.raises(ValueError, match=rf"`{own_corpus}` contains no binarised data"):
        data_utils.infer_language_pair(str(own_corpus))
