"""The scores of `nmt-moe score`, compared with multi-bleu.perl's and scores worked out by hand."""

import json
import math

import pytest
from click.testing import CliRunner

from nmt_moe.cli import main
from nmt_moe.scoring import measures as lib

# Public descriptions of BLEU use these two sentences (Papineni et al. 2002, NLTK).
GUIDE = [
    "it is a guide to action which ensures that the military always obeys the commands of "
    "the party .",
    "he read the book because he was interested in world history .",
]
GUIDE_REFERENCE = [
    "it is a guide to action that ensures that the military will forever heed Party commands .",
    "he was interested in world history because he read the book .",
]
# For these, multi-bleu.perl from mosesdecoder@31473d88 prints, without and with -lc:
#   BLEU = 50.40, 77.4/58.6/44.4/32.0 (BP=1.000, ratio=1.069, hyp_len=31, ref_len=29)
#   BLEU = 50.92, 80.6/58.6/44.4/32.0 (BP=1.000, ratio=1.069, hyp_len=31, ref_len=29)
CASED, LOWERED = 50.40, 50.92


def run(*arguments):
    return CliRunner().invoke(main, ["score", *map(str, arguments)])


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def measures(language=None):
    return {measure.name: measure for measure in lib.make_measures(language)}


def test_multi_bleu_matches_the_original_script():
    found = lib.score(measures()["multi-bleu"], GUIDE, [GUIDE_REFERENCE])
    assert round(found["score"], 2) == CASED
    assert found["details"].startswith("77.4/58.6/44.4/32.0 (BP = 1.000 ratio = 1.069")
    assert "hyp_len = 31 ref_len = 29" in found["details"]
    assert found["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:none|smooth:none|version:")
    assert found["signature"].endswith("|words:as given")
    # Of the n-grams of 1 to 4 words, 24 of 31, 17 of 29, 12 of 27 and 8 of 25 match.
    by_hand = (24 / 31 * 17 / 29 * 12 / 27 * 8 / 25) ** 0.25
    assert found["score"] == pytest.approx(100 * by_hand)


def test_lowercase_multi_bleu_matches_the_original_script():
    found = lib.score(measures()["multi-bleu-lowercase"], GUIDE, [GUIDE_REFERENCE])
    assert round(found["score"], 2) == LOWERED
    assert "|case:lc|" in found["signature"]


def test_the_brevity_penalty_of_a_short_translation_by_hand():
    found = lib.score(measures()["multi-bleu"], ["a b c d"], [["a b c d e"]])
    # Every n-gram matches, so only the factor exp(1 - 5/4) remains.
    assert found["score"] == pytest.approx(100 * math.exp(-0.25))


def test_multi_bleu_is_not_smoothed_so_it_is_zero_without_a_common_4_gram():
    assert lib.score(measures()["multi-bleu"], ["a b c x"], [["a b c d"]])["score"] == 0


def test_a_space_outside_ascii_joins_words_as_in_the_original_script():
    # multi-bleu.perl reads bytes. The non-breaking space joins "a" and "b", so there are 4 words.
    found = lib.score(measures()["multi-bleu"], ["a\u00a0b c d e"], [["a\u00a0b c d e"]])
    assert "hyp_len = 4 ref_len = 4" in found["details"]


def test_plain_text_is_tokenised_as_by_moses():
    tokenize, name = lib.make_tokenizer("fr")
    assert tokenize("L'homme dit: «oui».") == "L&apos; homme dit : « oui » ."
    assert name.startswith("moses-fr, sacremoses ")


def test_compounds_are_split_from_the_left_without_overlap():
    assert lib.split_compounds("a well-known man") == "a well ##AT##-##AT## known man"
    # This is the result of perl -ple 's{(\S)-(\S)}{$1 ##AT##-##AT## $2}g'.
    assert lib.split_compounds("a-b-c") == "a ##AT##-##AT## b-c"
    assert lib.split_compounds("on - off") == "on - off"


def test_split_compounds_by_hand():
    found = lib.score(
        measures()["multi-bleu-compound-split"], ["the co-op is open"], [["the co-op is shut"]]
    )
    # The precisions of "the co @-@ op is open" are 5/6, 4/5, 3/4 and 2/3.
    assert found["score"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert "not comparable with GNMT's" in found["signature"]


@pytest.fixture
def texts(tmp_path):
    lines = [f"The {n} old houses, and the {n} new ones, stand well-kept." for n in range(20)]
    half = [line if i % 2 else line.replace("old", "Old") for i, line in enumerate(lines)]
    worse = [line.replace("new ones", "one new") for line in lines]
    return {
        "ref": write(tmp_path / "ref.en", lines),
        "hyp": write(tmp_path / "hyp", half),
        "other": write(tmp_path / "other", worse),
        "src": write(tmp_path / "src", ["ein " * (1 + i) for i in range(19)] + [half[19]]),
    }


def test_all_scores_with_signatures_in_json(texts):
    done = run(texts["hyp"], texts["ref"], "--src", texts["src"], "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    found = {row["name"]: row for row in report["scores"]}
    assert list(found) == [
        "multi-bleu",
        "multi-bleu-lowercase",
        "multi-bleu-compound-split",
        "sacrebleu-13a",
        "sacrebleu-intl",
        "chrf",
        "ter",
    ]
    assert found["multi-bleu-lowercase"]["score"] == pytest.approx(100)
    assert found["multi-bleu"]["score"] < 100
    assert "|tok:13a|smooth:exp|" in found["sacrebleu-13a"]["signature"]
    assert "|tok:intl|smooth:exp|" in found["sacrebleu-intl"]["signature"]
    assert "|nc:6|nw:0|" in found["chrf"]["signature"]
    assert "tok:tercom" in found["ter"]["signature"]
    # The first 19 sources have 1 to 19 words. The last has 11, and its translation is a copy.
    rows = [(row["words"], row["sentences"]) for row in report["source"]["rows"]]
    assert rows == [("1-10", 10), ("11-20", 10)]
    assert report["source"]["copies"] == 1


def test_the_text_report_gives_score_details_and_signature(texts):
    done = run(texts["hyp"], texts["ref"], "--lang", "en")
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first.split()[0] == "multi-bleu"
    assert "BP = 1.000" in first
    assert "words:moses-en, sacremoses " in second


def test_the_bootstrap_recognises_worse_and_equal_translations(texts):
    flags = ["--samples", "200", "--json"]
    done = run(texts["hyp"], texts["ref"], "--against", texts["other"], *flags)
    assert done.exit_code == 0, done.stderr
    row = next(r for r in json.loads(done.stdout)["bootstrap"] if r["name"] == "sacrebleu-13a")
    assert row["score"] > row["other_score"] + row["interval"]
    assert row["p"] < 0.05
    assert "|bs:200|seed:12345|" in row["signature"]

    done = run(texts["hyp"], texts["ref"], "--against", texts["hyp"], *flags)
    for row in json.loads(done.stdout)["bootstrap"]:
        assert row["score"] == row["other_score"]
        assert row["p"] == 1


def test_tokenised_texts_get_only_the_scores_for_tokenised_text(tmp_path):
    hyp, ref = write(tmp_path / "hyp", GUIDE), write(tmp_path / "ref", GUIDE_REFERENCE)
    done = run(hyp, ref, "--tokenized", "--json")
    found = {row["name"]: round(row["score"], 2) for row in json.loads(done.stdout)["scores"]}
    assert found == {
        "multi-bleu": CASED,
        "multi-bleu-lowercase": LOWERED,
        "multi-bleu-compound-split": CASED,
    }


REFUSALS = [
    pytest.param("hyp", b"one\ntwo\n", [], "hyp` has 2", id="fewer-lines"),
    pytest.param("ref", b"", [], "ref.en` has no lines", id="empty"),
    pytest.param("hyp", b"\n" * 20, [], "hyp`: all lines (20) are empty", id="nothing-in-it"),
    pytest.param("hyp", b"\xff\n" * 20, [], "hyp`, line 1 is not valid UTF-8", id="not-utf-8"),
    pytest.param("src", b"one\n", [], "src` has 1", id="source"),
    pytest.param("other", b"one\n", [], "other` has 1", id="second-translation"),
    pytest.param("other", None, [], "other", id="missing"),
    pytest.param("other", b"x\n" * 20, ["--samples", "0"], "'--samples': 0 is not", id="samples"),
    pytest.param("other", b"x\n" * 20, ["--lang", "german"], "is 'german'", id="language"),
    pytest.param(
        "other", b"x\n" * 20, ["--tokenize", "13b"], "`--tokenize` must be one of", id="tokeniser"
    ),
    pytest.param(
        "other", b"x\n" * 20, ["--lang", "de", "--tokenized"], "leave one out", id="both-forms"
    ),
]


@pytest.mark.parametrize(("name", "content", "flags", "message"), REFUSALS)
def test_bad_input_is_refused_by_name(texts, name, content, flags, message):
    if content is None:
        texts[name].unlink()
    else:
        texts[name].write_bytes(content)
    flags = ["--src", texts["src"], "--against", texts["other"], *flags]
    done = run(texts["hyp"], texts["ref"], *flags)
    assert done.exit_code != 0
    assert message in done.stderr
    assert done.stdout == ""


def test_a_reference_whose_name_has_no_language_needs_one(texts, tmp_path):
    done = run(texts["hyp"], write(tmp_path / "reference", ["a"] * 20))
    assert done.exit_code == 1
    assert f"the language of `{tmp_path / 'reference'}` is unknown" in done.stderr
    assert "for example --lang de" in done.stderr
    done = run(texts["hyp"], write(tmp_path / "reference", []))
    assert "reference` has no lines" in done.stderr
    done = run(texts["hyp"], texts["ref"], "--lang", "german!")
    assert "`--lang` must be a two-letter language code, but is 'german!'" in done.stderr


def test_the_log_of_generate_is_refused_with_the_command_that_extracts_translations(texts):
    write(texts["hyp"], ["D-0\t-0.5\tone", "H-0\t-0.5\tone"])
    assert "nmt-moe hypotheses" in run(texts["hyp"], texts["ref"]).stderr


def test_the_best_of_several_references_counts(texts, tmp_path):
    write(tmp_path / "hyp", ["a b c d", "e f g h"])
    one = write(tmp_path / "one.en", ["a b c d", "x"])
    two = write(tmp_path / "two.en", ["x", "e f g h"])
    report = json.loads(run(tmp_path / "hyp", one, two, "--json").stdout)
    assert report["scores"][0]["score"] == pytest.approx(100)
    assert report["scores"][0]["signature"].startswith("nrefs:2|")


@pytest.mark.parametrize("language", ["zh", "zh_CN", "zho", "zh-Hans"])
def test_chinese_is_split_by_its_own_tokenizer(tmp_path, language):
    texts = [write(tmp_path / f"{name}.{language}", ["我喜欢猫。"]) for name in ("hyp", "ref")]
    report = json.loads(run(*texts, "--json").stdout)
    assert [row["name"] for row in report["scores"]] == ["sacrebleu-zh", "chrf", "ter"]
    assert report["scores"][0]["score"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ("th", "`--tokenize char`"),
        ("tha", "'th' is written without spaces"),
        ("jpn", "pip install 'sacrebleu[ja]'"),
        ("ko", "pip install 'sacrebleu[ko]'"),
    ],
)
def test_a_language_without_its_tokeniser_is_refused_with_a_remedy(
    tmp_path, monkeypatch, language, message
):
    monkeypatch.setattr(lib.importlib.util, "find_spec", lambda name: None)
    texts = [write(tmp_path / f"{name}.{language}", ["ฉันรักแมว"]) for name in ("hyp", "ref")]
    assert message in run(*texts).stderr
    report = json.loads(run(*texts, "--tokenize", "char", "--json").stdout)
    assert "|tok:char|" in next(r for r in report["scores"] if "char" in r["name"])["signature"]


@pytest.mark.parametrize(
    ("language", "tokens"),
    [
        ("ja", "char"),
        ("jpn", "char"),
        ("th", "char"),
        ("zh_CN", "zh"),
        ("zho", "zh"),
        ("de", "13a"),
    ],
)
def test_validation_compares_text_without_spaces_by_characters(language, tokens):
    assert lib.validation_tokens(language) == tokens
