"""The demo's sentences agree with handwritten ones, and a miniature run completes all steps."""

import datetime

import pytest

from recipes.demo import make_corpus
from tests.support.recipes import run_script


def make_item(template, **parts):
    item = {
        "thing": 3,
        "goods": 0,
        "number": 80,
        "ordinal": 21,
        "date": datetime.date(1901, 5, 2),
        "times": (19 * 60 + 30, 21 * 60 + 45),
        "has_spoken_quarters": True,
        "currency": 2,
        "price": (1, 0),
    }
    return make_corpus.Item(template=template, **(item | parts))


def test_a_bought_lamp_by_hand():
    item = make_item(9)
    assert make_corpus.say(item, "en") == (
        "on the second of May nineteen oh-one at half past seven in the evening the lamp cost "
        "one pound"
    )
    assert make_corpus.say(item, "fr") == (
        "le deux mai mille neuf cent un à dix-neuf heures trente la lampe coûtait une livre"
    )
    assert make_corpus.say(item, "de") == (
        "am zweiten Mai neunzehnhunderteins um neunzehn Uhr dreißig kostete die Lampe ein Pfund"
    )


def test_a_shop_round_midnight_by_hand():
    item = make_item(8, times=(0, 12 * 60 + 45))
    assert make_corpus.say(item, "en") == (
        "the shop opens at twelve o'clock at night and closes at a quarter to one in the afternoon"
    )
    assert make_corpus.say(item, "fr") == (
        "le magasin ouvre à zéro heure et ferme à douze heures quarante-cinq"
    )
    assert make_corpus.say(item, "de") == (
        "der Laden öffnet um null Uhr und schließt um zwölf Uhr fünfundvierzig"
    )


def test_french_numbers_agree_by_hand():
    item = make_item(10, number=200, price=(21, 1))
    assert make_corpus.say(item, "fr") == (
        "nous avons vendu deux cents livres pour vingt et une livres et un penny"
    )
    assert make_corpus.say(make_item(4), "fr") == "il y a quatre-vingts livres au musée"
    assert make_corpus.say(make_item(6, date=datetime.date(2000, 8, 1)), "fr") == (
        "elle est née le premier août deux mille"
    )


def test_german_one_agrees_by_hand():
    item = make_item(12, number=201, ordinal=2)
    assert make_corpus.say(item, "de") == (
        "er wohnt im zweiten Stock von Haus Nummer zweihunderteins"
    )
    assert make_corpus.say(make_item(4, number=201), "de") == (
        "im Museum gibt es zweihundertein Bücher"
    )


def test_a_weekday_is_that_of_the_date():
    # 2 May 1901 was a Thursday.
    assert make_corpus.say(make_item(13), "en").startswith("the meeting on Thursday, the second")
    assert "jeudi deux mai" in make_corpus.say(make_item(13), "fr")


def test_bare_items_by_hand():
    said = [make_corpus.say(make_item(t, number=91), "en") for t in range(make_corpus.NUM_BARE)]
    assert said == [
        "ninety-one",
        "one pound",
        "at half past seven in the evening",
        "on the second of May nineteen oh-one",
    ]
    said = [make_corpus.say(make_item(t, number=91), "fr") for t in range(make_corpus.NUM_BARE)]
    assert said == [
        "quatre-vingt-onze",
        "une livre",
        "à dix-neuf heures trente",
        "le deux mai mille neuf cent un",
    ]


@pytest.mark.parametrize("language", ["fr", "de"])
def test_languages_have_the_same_templates_and_words(language):
    english, other = make_corpus.LANGUAGES["en"], make_corpus.LANGUAGES[language]
    for name in ("templates", "things", "goods", "months", "weekdays", "currencies"):
        assert len(getattr(english, name)) == len(getattr(other, name)), name


def test_no_sentence_occurs_in_two_parts(tmp_path):
    sizes = {"train": 900, "valid": 50, "test": 50}
    make_corpus.write_corpus(tmp_path, "fr", sizes, seed=3)
    for language in ("en", "fr"):
        lines = [
            line
            for part in sizes
            for line in (tmp_path / f"{part}.{language}").read_text(encoding="utf-8").splitlines()
        ]
        assert len(lines) == len(set(lines)) == 1000


def test_parts_that_share_a_sentence_are_noticed():
    pairs = [("one", "un"), ("two", "un")]
    with pytest.raises(AssertionError, match="two parts share a sentence"):
        make_corpus.split_pairs(pairs, {"train": 1, "test": 1})


def test_the_same_seed_gives_the_same_corpus():
    first = make_corpus.make_pairs(200, "fr", seed=1)
    assert make_corpus.make_pairs(200, "fr", seed=1) == first
    assert make_corpus.make_pairs(200, "fr", seed=2) != first


def run(*arguments, **variables):
    return run_script("demo/run.sh", *arguments, **variables)


SIZES = {
    "MODEL_DIM": 16,
    "LSTM_HIDDEN_DIM": 16,
    "NUM_EXPERTS": 4,
    "EXPERT_HIDDEN_DIM": 16,
    "AVERAGE": 2,
    "SAVE_INTERVAL": 2,
    "BEAM": 2,
}


def test_all_steps_run_in_miniature_and_only_once(tmp_path):
    # The 13 test sentences are not a multiple of 8, so a dropped last batch would be noticed.
    flags = ["--updates", 4, "--train-size", 300, "--test-size", 13, "--device", "cpu"]
    flags += ["--target-lang", "de", "--work", tmp_path]
    first = run(*flags, **SIZES)
    assert first.returncode == 0, first.stdout + first.stderr
    assert len((tmp_path / "translation.de").read_text(encoding="utf-8").split("\n")) == 13 + 1
    assert "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|" in first.stdout
    assert "chrF2|nrefs:1|" in first.stdout
    assert first.stdout.count("\n  -> ") == 10
    assert f"Training log: {tmp_path}/training/train.log" in first.stdout

    again = run(*flags, **SIZES)
    assert again.returncode == 0, again.stderr
    for step in ("corpus", "pieces", "binarise", "train", "average", "translate", "score"):
        assert f"{step}: already done" in again.stdout


REFUSALS = [
    pytest.param(["--target-lang", "es"], "TARGET_LANG must be one of fr, de", id="language"),
    pytest.param(["--updates", "many"], "UPDATES must be a whole number of at least 1", id="word"),
    pytest.param(["--updates"], "--updates needs a value", id="no-value"),
    pytest.param(["--faster"], "unknown argument '--faster'", id="unknown"),
    pytest.param(["--device", "tpu"], "DEVICE must be one of auto, cpu, cuda", id="device"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_a_wrong_argument_is_refused_at_once(tmp_path, arguments, message):
    done = run(*arguments, WORK=tmp_path / "work")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "work").exists()


def test_help_names_every_flag():
    done = run("--help")
    assert done.returncode == 0
    for flag in ("--target-lang", "--train-size", "--updates", "--device", "--work", "--seed"):
        assert flag in done.stdout
