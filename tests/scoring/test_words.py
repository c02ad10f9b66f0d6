"""The F-measure of words by frequency, worked out by hand."""

import pytest

from nmt_moe.scoring.words import f_measure_by_frequency


def test_the_f_measure_by_hand():
    # The references contain a 5 times, b and c once each, and d never.
    references = ["a a b", "a a a c"]
    hypotheses = ["a b b", "d a a a a"]
    rows = f_measure_by_frequency(hypotheses, references, lambda line: line)
    assert [row["frequency"] for row in rows] == ["0", "1", "5-9"]
    never, once, often = rows
    assert (never["words"], never["precision"], never["f_measure"]) == (0, 0.0, 0.0)
    # In the translations, b occurs twice and matches once, and c is missing.
    assert once["words"] == 2
    assert once["precision"] == pytest.approx(50.0)
    assert once["recall"] == pytest.approx(50.0)
    # One a in the first sentence and three in the second match, and each side has five.
    assert often["f_measure"] == pytest.approx(100 * 4 / 5)


def test_bands_have_names():
    references = ["x " * 2000, "y " * 100, "z " * 4]
    rows = f_measure_by_frequency(references, references, lambda line: line)
    assert [row["frequency"] for row in rows] == ["2-4", "100-999", "1000-"]
    assert all(row["f_measure"] == 100 for row in rows)
