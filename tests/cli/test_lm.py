"""The command `nmt-moe lm`, called as a user would call it."""

import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nmt_moe.cli.lm import lm
from nmt_moe.inference import LanguageModel
from tests.support.bundles import LM, make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("lm"), LM)[0]


def run(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(lm, list(map(str, arguments)), input=stdin)


def test_score_prints_a_line_for_each_line_and_the_whole_text(bundle: Path, tmp_path: Path):
    text = tmp_path / "text"
    text.write_text("the cat sees\n\na dog\n")
    result = run("score", bundle, text)
    assert result.exit_code == 0
    header, *rows = result.stdout.splitlines()
    scores = LanguageModel.load(bundle).score(["the cat sees", "", "a dog"])
    names = header.split("\t")
    for row, one in zip(rows, scores, strict=True):
        values = dict(zip(names, map(float, row.split("\t")), strict=True))
        assert values["log_prob"] == pytest.approx(one.log_prob, abs=1e-4)
        assert values["ppl_per_word"] == pytest.approx(
            math.exp(-one.log_prob / (one.num_words + 1)), rel=1e-4
        )
        assert values["pieces"] == len(one.pieces)
    total = sum(one.log_prob for one in scores)
    assert f"{math.exp(-total / (5 + 3)):.3f} per word" in result.stderr


def test_a_line_that_is_not_text_is_named_and_the_others_are_scored(bundle: Path):
    result = run("score", bundle, stdin=b"the cat\nbad \xff\nthe cat\n")
    rows = result.stdout.splitlines()[1:]
    assert result.exit_code == 1
    assert rows[0] == rows[2]
    assert rows[1] == ""
    assert "line 2 is not valid UTF-8" in result.stderr


def test_samples_begin_with_the_prefix_and_depend_on_the_seed(bundle: Path):
    options = ["--count", 3, "--prefix", "the cat", "--max-pieces", 20]
    first, again = (run("sample", bundle, *options, "--seed", 4).stdout for _ in range(2))
    assert first == again != run("sample", bundle, *options, "--seed", 5).stdout
    assert all(line.startswith("the cat") for line in first.splitlines())
    assert "num_samples" in run("sample", bundle, "--count", 0).stderr
