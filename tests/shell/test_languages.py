"""Valid values for languages, pairs and oversampling are read, and others are refused."""

from pathlib import Path

import pytest

from nmt_moe import plugin

plugin.register()

from fairseq.data import Dictionary  # noqa: E402

from nmt_moe.tasks._languages import (  # noqa: E402
    Pair,
    check_languages,
    describe_languages,
    load_shared_dictionary,
    parse_languages,
    parse_oversampling,
    parse_pairs,
)
from tests.support.multilingual import write_dictionary  # noqa: E402

EN_FR, FR_EN = Pair("en", "fr"), Pair("fr", "en")


def test_pairs_and_languages_are_read_in_their_order():
    assert parse_pairs("en-fr,fr-en") == [EN_FR, FR_EN]
    assert parse_languages("", [FR_EN, EN_FR]) == ["fr", "en"]
    assert parse_languages("de,en,fr", [FR_EN]) == ["de", "en", "fr"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`--lang-pairs` must name at least one pair, but is missing"),
        ("en_fr", "must name pairs such as en-fr, .* but has 'en_fr'"),
        ("en-fr-de", "but has 'en-fr-de'"),
        ("en-fr,", "but has ''"),
        ("en-", "but has 'en-'"),
        ("en-en", "source and target must differ, but are equal in 'en-en'"),
        ("en-fr,en-fr", "must name each pair once, but has 'en-fr' twice"),
    ],
)
def test_invalid_pairs_are_refused_by_name(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_pairs(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("en,de", "a language of 'en-fr' must be one of en, de, but is 'fr'"),
        ("en,fr,en", "must name each language once, but has 'en' twice"),
        ("en, fr", "but has ' fr'"),
    ],
)
def test_mismatched_languages_are_refused_by_name(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_languages(text, [EN_FR])


def test_oversampling_is_read_as_passes():
    assert parse_oversampling("fr-en=2.5", [EN_FR, FR_EN]) == {"fr-en": 2.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("en-de=2", "a pair must be one of --lang-pairs, en-fr, but is 'en-de'"),
        ("en-fr", "must give each pair a number, such as en-fr=8, but has 'en-fr'"),
        ("en-fr=x", "but has 'en-fr=x'"),
        ("en-fr=0", "`--oversampling` for en-fr must be a finite number greater than 0"),
        ("en-fr=nan", "must be a finite number greater than 0, but is nan"),
    ],
)
def test_impossible_oversampling_is_refused_by_name(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_oversampling(text, [EN_FR])


def write_dictionaries(folder: Path, **languages: str) -> Path:
    for name, content in languages.items():
        write_dictionary(folder / f"dict.{name}.txt", content)
    return folder


def test_language_tokens_are_added_to_the_dictionary_in_the_order_of_the_languages(tmp_path: Path):
    folder = write_dictionaries(tmp_path, fr="aa", en="aa")
    dictionary = load_shared_dictionary(str(folder), ["fr", "en"])
    assert dictionary.symbols[-2:] == ["<2fr>", "<2en>"]
    typed = dictionary.encode_line("<2fr> <2de>", add_if_not_exist=False)
    assert typed.tolist() == [dictionary.unk(), dictionary.unk(), dictionary.eos()]


def test_a_language_token_that_is_a_word_of_the_texts_is_refused(tmp_path: Path):
    folder = write_dictionaries(tmp_path, fr="aa", en="aa")
    for path in folder.iterdir():
        path.write_text(path.read_text() + "<2fr> 3\n")
    with pytest.raises(ValueError, match=r"dict\.fr\.txt` has the word `<2fr>`, which stands for"):
        load_shared_dictionary(str(folder), ["fr", "en"])


def test_different_dictionaries_are_refused_by_name(tmp_path: Path):
    folder = write_dictionaries(tmp_path, en="aa", fr="aa", de="bb")
    with pytest.raises(ValueError, match=r"`dict.en.txt` and `dict.de.txt` in .* differ"):
        load_shared_dictionary(str(folder), ["en", "fr", "de"])


def test_a_language_without_a_dictionary_is_named(tmp_path: Path):
    folder = write_dictionaries(tmp_path, en="aa")
    with pytest.raises(FileNotFoundError, match="no text of the language 'ko'"):
        load_shared_dictionary(str(folder), ["en", "ko"])


def make_dictionary(*symbols: str) -> Dictionary:
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


def test_a_checkpoint_fits_its_own_languages_and_no_others():
    dictionary = make_dictionary("a", "b")
    saved = describe_languages(["en", "fr"], dictionary)
    check_languages(saved, ["en", "fr"], dictionary)
    with pytest.raises(ValueError, match=r"order, en,fr, but name fr,en\. Add --langs en,fr"):
        check_languages(saved, ["fr", "en"], dictionary)
    with pytest.raises(ValueError, match="symbol 5 is 'c', not 'b'"):
        check_languages(saved, ["en", "fr"], make_dictionary("a", "c"))
    with pytest.raises(ValueError, match="symbol 6 is 'c', not missing"):
        check_languages(saved, ["en", "fr"], make_dictionary("a", "b", "c"))
    with pytest.raises(ValueError, match="not from a multilingual task"):
        check_languages({}, ["en", "fr"], dictionary)
